"""Tensors in a safetensors file: written in a stream without a second copy in memory, read by the safetensors library.

What the format itself loses is kept in its metadata: the memory layout of dense tensors that are not contiguous (channels_last).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .durable import replace_file, write_file

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write `tensors` (any device, any strides, 0-dim and empty ones too) to `path`; returns size and sha256.

    Extra memory: one tensor where it is not dense or not on the CPU. Raises CheckpointError for a dtype safetensors does not have, OSError.
    """
    return write_file(path, _chunks(tensors))


def replace_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """As `write_tensors`, but a reader of `path` sees the old content or the new, also after a crash."""
    return replace_file(path, _chunks(tensors))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into CPU tensors of their own memory. Raises CheckpointError if it is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            strides = json.loads((file.metadata() or {}).get("strides", "{}"))
            # clone: the library maps the file, and a mapped file that shrinks later kills the process
            return {name: _with_strides(file.get_tensor(name), strides.get(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    order = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # large elements first keeps every tensor aligned
    header: dict[str, object] = {}
    strides = {name: list(tensors[name].stride()) for name in order if _is_permuted(tensors[name])}
    if strides:
        header["__metadata__"] = {"strides": json.dumps(strides)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES or name == "__metadata__":
            expected = ", ".join(map(str, _DTYPES))
            raise CheckpointError(
                f"Tensor {name!r} of dtype {tensor.dtype} cannot be stored; expected one of {expected}."
            )
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _is_permuted(tensor: Tensor) -> bool:
    """Dense, but not in row-major order: the strides are worth keeping."""
    if tensor.is_contiguous():
        return False
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def _with_strides(tensor: Tensor, stride: list[int] | None) -> Tensor:
    if stride is None:
        return tensor.clone()
    if not _is_permuted(
        torch.empty_strided(tensor.shape, stride, device="meta")
    ):  # a lie here could ask for any amount of memory
        raise ValueError(f"strides {stride} do not fit shape {list(tensor.shape)}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
