"""upsampled_prediction: class and confidence of every pixel of bilinearly up-sampled logits, without the up-sampled logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, UpsampledClasses
from . import checks, dispatched

_OP = "upsampled_prediction"


class Prediction(NamedTuple):
    labels: Tensor  # [B, H, W] uint8
    confidence: Tensor  # [B, H, W] float32


def upsampled_prediction(
    logits: Tensor,  # [B, K, h, w]
    size: tuple[int, int],  # (H, W)
    *,
    temperature: float = 1.0,
    align_corners: bool = True,
    thresholds: Tensor | None = None,  # [K]
    ignore_index: int = 255,
    backend: str | None = None,
) -> Prediction:
    """argmax and maximum of softmax(F.interpolate(logits, size, mode="bilinear") / temperature).

    Where the confidence is below its class's threshold the label is ignore_index: a pseudo-label.
    Not differentiable. Labels are uint8, so K <= 256 and ignore_index in [0, 255] (and not a class where thresholds are given).
    Raises ValueError or TypeError for what does not fit. Memory: 5 bytes a pixel, the two results.
    Source: `pseudo_label.py` of the SPCL code.
    """
    checks.check_float(_OP, "logits", logits, (4,), "[B, K, h, w]")
    if 0 in logits.shape[1:]:
        raise ValueError(f"{_OP}: logits must hold at least one class and one node, got shape {list(logits.shape)}")
    if logits.shape[1] > 256:
        raise ValueError(f"{_OP}: at most 256 classes fit a uint8 label, got logits {list(logits.shape)}")
    if not isinstance(size, (tuple, list)):
        raise TypeError(f"{_OP}: size must be (H, W), got {size!r}")
    if any(isinstance(value, float) for value in size):
        raise TypeError(f"{_OP}: size must be (H, W) in whole pixels, got {tuple(size)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{_OP}: size must be (H, W), each at least 1, got {tuple(size)}")
    checks.check_temperature(_OP, temperature)
    checks.check_options(_OP, ignore_index=ignore_index, backend=backend, align_corners=align_corners)
    if not 0 <= ignore_index <= 255:
        raise ValueError(f"{_OP}: ignore_index must fit a uint8 label, got {ignore_index}")
    checks.check_constant(_OP, "thresholds", thresholds, ((logits.shape[1],),), "one threshold a class")
    checks.check_device(_OP, logits, "logits", thresholds=thresholds)
    if thresholds is not None and ignore_index < logits.shape[1]:
        raise ValueError(
            f"{_OP}: ignore_index {ignore_index} is one of the {logits.shape[1]} classes; with thresholds it must be none"
        )
    thresholds = None if thresholds is None else thresholds.float()
    values = logits.shape[0] * logits.shape[1] * size[0] * size[1]
    line = dispatched.line(
        "align_corners" if align_corners else "",
        "small" if backends.is_small(values) else "",
        f"@{backend}" if backend else "",
    )
    return Prediction(*_prediction(logits.detach(), thresholds, float(temperature), [*size, ignore_index], line))


@torch.library.custom_op("spcl_fast::upsampled_prediction", mutates_args=())
def _prediction(
    logits: Tensor, thresholds: Tensor | None, temperature: float, integers: Sequence[int], line: str
) -> tuple[Tensor, Tensor]:
    height, width, ignore_index = integers
    words = dispatched.words(line)
    ask = Ask(_OP, logits.device, logits.dtype, logits.shape[1], logits.shape[1], "small" in words)
    problem = UpsampledClasses(logits, (height, width), "align_corners" in words, ignore_index, temperature, thresholds)
    return backends.choose(ask, dispatched.named_backend(line)).upsampled_prediction(problem)


@_prediction.register_fake
def _(logits, thresholds, temperature, integers, line):
    shape = (logits.shape[0], *integers[:2])
    return logits.new_empty(shape, dtype=torch.uint8), logits.new_empty(shape, dtype=torch.float32)


_prediction.register_vmap(dispatched.looped_over_batch(_prediction))
