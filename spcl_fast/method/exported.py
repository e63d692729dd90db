"""A net in one file for other programs, ONNX or a torch.export package: what is in it, and how it is read.

Both take `images` [B, 3, H, W], float32 RGB in [0, 1] of any size, and give `logits` [B, K, h, w], float32, h ~ H / stride; the net's own
mean and standard deviation are inside. What else a reader needs is in the file as JSON under "spcl_fast": see `Facts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.classes import ClassSet
from ..errors import CheckpointError
from ..runs.layout import ONNX

KEY = "spcl_fast"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is written into the file. size: (width, height) at which the net saw its target's images; None: their own."""

    net: str
    stride: int
    size: tuple[int, int] | None
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int

    @property
    def class_set(self) -> ClassSet:
        return ClassSet(self.classes, self.palette, ignore_index=self.ignore_index)

    def as_text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_text(cls, text: str, path: Path) -> Facts:
        try:
            value = json.loads(text)
            size = value["size"] and (int(value["size"][0]), int(value["size"][1]))
            palette = tuple((int(r), int(g), int(b)) for r, g, b in value["palette"])
            return cls(
                str(value["net"]), int(value["stride"]), size, tuple(value["classes"]), palette, value["ignore_index"]
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{path} does not say which classes it predicts ({error!r}). Expected a file made by `spcl-fast export`."
            ) from None


class Exported(nn.Module):
    """An exported file in the place of a net: model(images) -> (None, logits)."""

    def __init__(self, run: Callable[[Tensor], Tensor], stride: int) -> None:
        super().__init__()
        self.run, self.stride = run, stride

    def forward(self, images: Tensor) -> tuple[None, Tensor]:
        return None, self.run(images)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's exporters say about themselves and about packages that nobody needs here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def load_exported(path: Path) -> tuple[Exported, Facts]:
    """For CPU tensors. Raises CheckpointError where `spcl-fast export` did not make the file, ModuleNotFoundError without ONNX Runtime."""
    run, facts = (_read_onnx if path.suffix == ONNX else _read_torch)(path)
    return Exported(run, facts.stride), facts


def _read_torch(path: Path) -> tuple[Callable[[Tensor], Tensor], Facts]:
    extra = {KEY: ""}
    try:
        with quiet():
            program = torch.export.load(path, extra_files=extra)
    except Exception as error:
        raise CheckpointError(f"{path} is no torch.export package: {str(error).splitlines()[0][:200]}") from None
    return program.module(), Facts.from_text(extra[KEY], path)


def _read_onnx(path: Path) -> tuple[Callable[[Tensor], Tensor], Facts]:
    import onnxruntime as runtime  # pyright: ignore[reportMissingImports]

    try:
        session = runtime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckpointError(f"{path} is no ONNX file: {str(error).splitlines()[0][:200]}") from None
    facts = Facts.from_text(session.get_modelmeta().custom_metadata_map.get(KEY, ""), path)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), facts
