"""upsampled_confusion: the confusion matrix of bilinearly up-sampled logits, without a prediction map."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, UpsampledClasses
from . import checks, dispatched

_OP = "upsampled_confusion"


def upsampled_confusion(
    logits: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W], any integer dtype or bool
    *,
    align_corners: bool = True,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:  # [K, K] int64
    """Pixels by label (row) and by argmax of F.interpolate(logits, labels' size, mode="bilinear") (column): evaluation at full size.

    logits [B, K, h, w], labels [B, H, W] integers -> [K, K] int64; sum it over batches. align_corners must be that of training: True, as
    in SPCL's code, where F.interpolate's and mmsegmentation's default is False.
    The first of equal logits is taken, and NaN is the largest, as in argmax; which pixels it reaches, and what inf and -inf mean, is as in
    `upsampled_prediction`. Pixels with ignore_index are left out. Not differentiable. On the CPU ValueError for a label outside [0, K)
    that is not ignore_index; on a GPU it is left out and
    `check_labels` reports it. Memory: O(K^2); no up-sampled logits, no prediction.
    """
    checks.check_logits(_OP, logits)
    checks.check_labels_tensor(_OP, labels, 3, "[B, H, W]")
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{_OP}: logits and labels must hold as many images, got {list(logits.shape)} and {list(labels.shape)}"
        )
    checks.check_options(_OP, ignore_index=ignore_index, backend=backend, align_corners=align_corners)
    checks.check_device(_OP, logits, "logits", labels=labels)
    small = backends.is_small(labels.numel() * logits.shape[1])
    line = dispatched.line(
        "align_corners" if align_corners else "", "small" if small else "", f"@{backend}" if backend else ""
    )
    return _confusion(logits.detach(), checks.as_integers(labels), ignore_index, line)


@torch.library.custom_op("spcl_fast::upsampled_confusion", mutates_args=())
def _confusion(logits: Tensor, labels: Tensor, ignore_index: int, line: str) -> Tensor:
    words, classes = dispatched.words(line), logits.shape[1]
    ask = Ask(_OP, logits.device, logits.dtype, classes, classes, "small" in words)
    size = (labels.shape[1], labels.shape[2])
    problem = UpsampledClasses(logits, size, "align_corners" in words, ignore_index, labels=labels)
    return backends.choose(ask, dispatched.named_backend(line)).upsampled_confusion(problem)


@_confusion.register_fake
def _(logits, labels, ignore_index, line):
    return logits.new_empty((logits.shape[1], logits.shape[1]), dtype=torch.int64)


_confusion.register_vmap(dispatched.looped_over_batch(_confusion))
