"""Compile every Triton kernel for sm_80 and sm_90 without a GPU: `python -m benchmarks.kernels_check.triton_kernels [--quick]`.

The launchers run on "meta" tensors of the quoted shapes while the kernels are replaced by a recorder; each recorded launch is compiled with
the very specialisation (types, divisibility, ones, settings) it would have on a GPU. Printed per kernel: registers, shared memory, stack,
which matrix instruction, 16-byte loads. Fails on a spill, on more shared memory than the architecture has, on a half-float dot without a
matrix instruction, and on an aligned feature map that is not loaded 16 bytes at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from spcl_fast.backends.contract import Contrast, Moments, Saved, UpsampledClasses, UpsampledLoss, Wanted
from spcl_fast.kernels import class_moments as moments
from spcl_fast.kernels import pixels
from spcl_fast.kernels import upsampled_cross_entropy as upsample
from spcl_fast.kernels import upsampled_prediction as prediction
from spcl_fast.kernels.operands import Map, Size
from spcl_fast.kernels.prototype_contrastive_loss import contrast, pool, prototypes

_MODULES = (pixels, contrast, pool, prototypes, moments, upsample, prediction)
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel with the specialisation that a launch would give it; a path is where a value lies among the arguments and operands."""

    name: str
    kernel: object
    signature: tuple[tuple[str, object], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]
    attributes: tuple[tuple[tuple[int, ...], str], ...]  # paths of what is divisible by 16
    options: tuple[tuple[str, int], ...]
    grid: tuple[int, ...] = dataclasses.field(compare=False)

    @property
    def dtype(self) -> str:
        names = dict(self.signature)
        for operand in ("features", "logits", "labels", "partial_ptr"):
            kind = names.get(operand, "")
            kind = kind[0] if isinstance(kind, tuple) else kind
            if kind.startswith("*"):
                return kind.lstrip("*")
        return ""

    def constant(self, name: str) -> object:
        """Value of a constexpr parameter; None where the kernel has none of this name."""
        names = [key for key, _ in self.signature]
        return dict(self.constants).get((names.index(name),)) if name in names else None


class _Recorder:
    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(describe(self.kernel, grid, args, kwargs))


def describe(kernel, grid, args, kwargs) -> Launch:
    """The specialisation that Triton's launcher chooses for these arguments: its own binder is asked. Meta tensors count as aligned."""
    options = tuple((k, v) for k, v in kwargs.items() if k in _OPTIONS)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, specialization, _ = binder(*args, **{k: v for k, v in kwargs.items() if k not in _OPTIONS})
    kinds = [kind for kind, _ in specialization]
    constants = {path: _at(list(values.values()), path) for path, kind in _leaves(kinds) if kind == "constexpr"}
    attributes = [None if kind == "constexpr" else attribute for kind, attribute in specialization]
    name = kernel.__name__.removesuffix("_kernel")
    return Launch(
        name, kernel, tuple(zip(values, kinds, strict=True)), tuple(constants.items()),
        tuple((path, text) for path, text in _leaves(attributes) if isinstance(text, str) and text), options, tuple(grid),
    )  # fmt: skip


def _leaves(values, path=()) -> Iterator[tuple[tuple[int, ...], object]]:
    for index, value in enumerate(values):
        if isinstance(value, tuple):
            yield from _leaves(value, (*path, index))
        else:
            yield (*path, index), value


def _at(values, path: tuple[int, ...]):
    for index in path:
        values = values[index]
    return values


@contextlib.contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Launches within the context are recorded instead of done, with the settings of `arch`."""
    launches: list[Launch] = []
    saved = []
    for module in _MODULES:
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                saved.append((module, name, value))
                setattr(module, name, _Recorder(value, launches))
            elif name == "architecture":
                saved.append((module, name, value))
                setattr(module, name, lambda tensor: arch)
    try:
        yield launches
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


# ---- what is launched ---------------------------------------------------------------------------------------------

SHAPES = {
    "A": (1, 2048, 91, 161, 19),
    "B": (2, 256, 256, 512, 19),
    "C": (1, 512, 512, 1024, 150),
    "D": (8, 256, 128, 256, 1900),
}
UPSAMPLED = {
    "U1": ((1, 19, 91, 161), (720, 1280)), "U2": ((2, 19, 128, 256), (512, 1024)), "U3": ((16, 150, 128, 128), (512, 512)),
}  # fmt: skip


def _meta(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _features(shape, dtype, channels_last: bool) -> torch.Tensor:
    features = _meta(*shape[:4], dtype=dtype)
    return features.to(memory_format=torch.channels_last) if channels_last else features


def _contrast(
    shape, dtype, *, channels_last=False, labels=torch.uint8, weights=False, reduction="mean", normalize=True, prototypes=True
) -> None:  # fmt: skip
    batch, dim, height, width, num_classes = shape
    problem = Contrast(
        _features(shape, dtype, channels_last), _meta(batch, 2 * height, 2 * width, dtype=labels), _meta(num_classes, dim),
        _meta(num_classes) if weights else None, _meta(batch, height, width) if weights else None, None, 0.1, normalize, 255, reduction,
    )  # fmt: skip
    _forward_and_backward(problem, Wanted(features=True, prototypes=prototypes))


def _forward_and_backward(problem: Contrast, wanted: Wanted) -> None:
    flag = _meta(dtype=torch.int64)
    loss, *saved = contrast.contrast_forward(problem, wanted, flag, 0)
    contrast.contrast_backward(
        _meta(*loss.shape), problem, Saved(*saved, problem.features.new_empty(0)), wanted, flag, 0
    )


def _moments(shape, dtype, *, channels_last=False, squares=False) -> None:
    labels = _meta(shape[0], *shape[2:4], dtype=torch.uint8)
    problem = Moments(_features(shape, dtype, channels_last), labels, shape[4], True, 255, squares)
    moments.class_moments(problem, _meta(dtype=torch.int64))


def _upsampled(case, dtype, *, align_corners=True, reduction="mean", gradient=True, weights=False) -> None:
    (batch, num_classes, h, w), size = case
    logits = _meta(batch, num_classes, h, w, dtype=dtype)
    weight = (_meta(num_classes), _meta(batch, *size)) if weights else (None, None)
    loss = UpsampledLoss(logits, _meta(batch, *size, dtype=torch.uint8), *weight, 1.8, align_corners, 255, reduction)
    upsample.upsampled_cross_entropy(loss, gradient, _meta(dtype=torch.int64), 0)
    prediction.upsampled_prediction(UpsampledClasses(logits, size, align_corners, 255, 1.8, _meta(num_classes)))


def cases(quick: bool) -> Iterator[Callable[[], None]]:
    """Every op on the quoted shapes, in the dtypes and layouts the table knows; quick leaves out what compiles to much the same."""
    dtypes = (torch.float32, torch.bfloat16) if quick else (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        for shape in SHAPES.values():
            yield lambda s=shape, d=dtype: _contrast(s, d)
            yield lambda s=shape, d=dtype: _moments(s, d)
        for case in (UPSAMPLED["U1"],) if quick else UPSAMPLED.values():
            yield lambda c=case, d=dtype: _upsampled(c, d)
        yield lambda d=dtype: _contrast((1, 2048, 64, 64, 1900), d, prototypes=not quick)  # both D and K in steps
        if quick:
            continue
        for shape in SHAPES.values():
            yield lambda s=shape, d=dtype: _contrast(s, d, channels_last=True)
            yield lambda s=shape, d=dtype: _moments(s, d, channels_last=True)
        yield lambda d=dtype: _contrast(
            SHAPES["B"], d, labels=torch.int64, weights=True, reduction="none", normalize=False
        )
        yield lambda d=dtype: _contrast((2, 48, 33, 65, 100_000), d)
        yield lambda d=dtype: _contrast((2, 64, 64, 64, 64), d)
        yield lambda d=dtype: _moments((2, 48, 33, 65, 100_000), d)
        yield lambda d=dtype: _moments(SHAPES["B"], d, squares=True)
        for case in UPSAMPLED.values():
            yield lambda c=case, d=dtype: _upsampled(c, d, align_corners=False, weights=True)
            yield lambda c=case, d=dtype: _upsampled(c, d, gradient=False, reduction="none")
        yield lambda d=dtype: _upsampled(((2, 19, 128, 128), (64, 48)), d)


# ---- compile and read ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Usage:
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix: str  # wgmma | mma | fma
    wide_loads: int  # 16-byte loads from global memory


def compiled(launch: Launch, capability: int) -> Usage:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    attributes = {path: backend.parse_attr(text) for path, text in launch.attributes}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    binary = triton.compile(source, target=target, options=dict(launch.options))
    ptx = binary.asm["ptx"]
    wide = len(
        re.findall(
            r"cp\.async\.cg\.shared\.global|ld\.global[\w:.]*\.v4\.(?:b32|u32|f32)|ld\.global[\w:.]*\.v2\.b64", ptx
        )
    )
    matrix = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "fma"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    return Usage(used["REG"], used["STACK"] + used["LOCAL"], binary.metadata.shared, matrix, wide)


def _cuobjdump() -> str:
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(own) if own.exists() else "cuobjdump"


def faults(launch: Launch, usage: Usage, capability: int) -> list[str]:
    found = []
    if usage.stack_bytes:
        found.append(f"{usage.stack_bytes} bytes spilled")
    if usage.shared_bytes > SHARED_BYTES[capability]:
        found.append(f"{usage.shared_bytes} bytes of shared memory, the architecture has {SHARED_BYTES[capability]}")
    names = [name for name, _ in launch.signature]
    if "PRECISION" in names or "resident" in launch.name:  # kernels with a dot
        half = launch.dtype in ("bf16", "fp16") or launch.constant("PRECISION") == "tf32"
        if half and usage.matrix == "fma":
            found.append("no matrix instruction")
        if _wide_rows(launch, names) and not usage.wide_loads:
            found.append("no 16-byte load of an aligned feature map")
    return found


def _wide_rows(launch: Launch, names: list[str]) -> bool:
    """Whether the feature map's rows follow each other and every stride and the number of pixels is a multiple of 16, or 1."""
    features, size = names.index("features"), names.index("size")
    known = {path for path, _ in (*launch.constants, *launch.attributes)}
    strides = [(features, Map._fields.index(field)) for field in ("stride_b", "stride_d", "stride_w")]
    flat = dict(launch.constants).get((features, Map._fields.index("stride_h")), 0) is None
    return flat and {*strides, (size, Size._fields.index("P"))} <= known


_HEADER = "kernel             dtype arch   warps stages  regs  shared stack dot     16B  blocks"


def _line(launch: Launch, usage: Usage, capability: int) -> str:
    options = dict(launch.options)
    blocks = [
        f"{name.removeprefix('BLOCK_')}={launch.constant(name)}"
        for name, _ in launch.signature
        if name.startswith("BLOCK") or name in ("ROWS", "COLS", "TAIL")
    ]
    return (
        f"{launch.name:18} {launch.dtype:5} sm_{capability:<3} {options.get('num_warps', 4):5} {options.get('num_stages', 3):6} "
        f"{usage.registers:5} {usage.shared_bytes:7} {usage.stack_bytes:5} {usage.matrix:6} {usage.wide_loads:4}  {' '.join(blocks)}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels_check.triton_kernels", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="default settings, fewer dtypes and layouts (for the test suite)"
    )
    parser.add_argument("--kernel", nargs="*", default=[], help="only kernels whose name has one of these words")
    parser.add_argument("--capability", type=int, nargs="*", default=[80, 90], choices=sorted(SHARED_BYTES))
    options = parser.parse_args(argv)
    if pixels.INTERPRETED:
        print("kernels-check compiles; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    print(_HEADER)
    wrong = 0
    for capability in options.capability:
        with recorded(f"sm_{capability}") as launches:
            for case in cases(options.quick):
                case()
        for launch in dict.fromkeys(launches):
            if options.kernel and not any(word in launch.name for word in options.kernel):
                continue
            usage = compiled(launch, capability)
            found = faults(launch, usage, capability)
            wrong += bool(found)
            print(_line(launch, usage, capability) + "".join(f"  <-- {text}" for text in found), flush=True)
    print(f"{wrong} faulty" if wrong else "no spills, shared memory within limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "spcl_fast_kernels_check"))
    sys.exit(main())
