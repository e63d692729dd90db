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


_WORD = {torch.uint8: "a uint8", torch.int32: "an int32"}


class Prediction(NamedTuple):
    labels: Tensor  # [B, H, W] uint8; int32 for more than 255 classes
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

    Where the confidence is not at least its class's threshold (NaN is not) the label is ignore_index: a pseudo-label. With thresholds
    ignore_index must be no class.
    Not differentiable. Labels are uint8 up to 255 classes and int32 beyond; ignore_index must fit.
    NaN is the largest logit, as in argmax, inf is as NaN, and both give a confidence of NaN. They reach the pixels that they reach in
    F.interpolate: those of the cells around the node, also with weight 0, and at equal size the pixel on it alone. A class that is -inf at
    every corner of a pixel's cell is never predicted and has probability 0; -inf of weight 0 does not count.
    Raises ValueError or TypeError for what does not fit. Memory: 5 bytes per pixel (8 beyond 255 classes), the two results.
    Source: `pseudo_label.py` of the SPCL code.
    """
    checks.check_logits(_OP, logits)
    checks.check_size(_OP, size)
    checks.check_temperature(_OP, temperature)
    checks.check_options(_OP, ignore_index=ignore_index, backend=backend, align_corners=align_corners)
    dtype = label_dtype(logits.shape[1])
    if not torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        raise ValueError(f"{_OP}: ignore_index must fit {_WORD[dtype]} label, got {ignore_index}")
    checks.check_constant(_OP, "thresholds", thresholds, ((logits.shape[1],),), "one threshold a class")
    checks.check_device(_OP, logits, "logits", thresholds=thresholds)
    if thresholds is not None and 0 <= ignore_index < logits.shape[1]:
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
    return Prediction(*_run(logits.detach(), thresholds, float(temperature), [*size, ignore_index], line))


def label_dtype(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 255 else torch.int32


@torch.library.custom_op("spcl_fast::upsampled_prediction", mutates_args=())
def _prediction(
    logits: Tensor, thresholds: Tensor | None, temperature: float, integers: Sequence[int], line: str
) -> tuple[Tensor, Tensor]:
    height, width, ignore_index = integers
    words = dispatched.words(line)
    needs = frozenset(("int32_labels",)) if logits.shape[1] > 255 else frozenset()
    ask = Ask(_OP, logits.device, logits.dtype, logits.shape[1], logits.shape[1], "small" in words, needs)
    problem = UpsampledClasses(logits, (height, width), "align_corners" in words, ignore_index, temperature, thresholds)
    return backends.choose(ask, dispatched.named_backend(line)).upsampled_prediction(problem)


@_prediction.register_fake
def _(logits, thresholds, temperature, integers, line):
    shape = (logits.shape[0], *integers[:2])
    return logits.new_empty(shape, dtype=label_dtype(logits.shape[1])), logits.new_empty(shape, dtype=torch.float32)


_prediction.register_vmap(dispatched.looped_over_batch(_prediction))
_run = dispatched.direct(_prediction)
