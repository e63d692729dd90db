"""class_moments: per class the sum (and the sum of squares) of its pixels' features, and their number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, Moments
from . import checks, dispatched

_OP = "class_moments"


class ClassMoments(NamedTuple):
    sums: Tensor  # [K, D] float32
    counts: Tensor  # [K] int64
    squares: Tensor | None  # [K, D] float32


def class_moments(
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], any integer dtype
    num_classes: int,
    *,
    normalize: bool = True,
    squares: bool = False,
    ignore_index: int = 255,
    backend: str | None = None,
) -> ClassMoments:
    """Sum of the (unit) features of each class, and how many pixels each has: what a prototype update needs.

        sums_k = sum over pixels with label k of x/|x|        squares_k = the same of (x/|x|)^2        counts_k = their number

    Not differentiable: prototypes are statistics. Accumulates in float32 or better; the same bits for any number of threads.
    Labels are read at the features' pixels by the nearest rule. `normalize=False` sums x itself.
    Raises as `prototype_contrastive_loss`; on the CPU ValueError for a label outside [0, num_classes) that is not ignore_index.
    Memory: reads the features once; allocates [K, D] and partials of it, nothing of the features' size.
    Source: the prototype update of SPCL, arXiv 2111.12358; `train_ours.py` of the released code.
    """
    checks.check_pixels(_OP, features, labels)
    checks.check_options(_OP, ignore_index=ignore_index, backend=backend, normalize=normalize, squares=squares)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"{_OP}: num_classes must be an int of at least 1, got {num_classes!r}")
    if features.dim() == 2:
        features, labels = features.t()[None, :, :, None], labels[None, :, None]
    line = dispatched.line(
        "normalize" if normalize else "", "squares" if squares else "", f"@{backend}" if backend else "",
        "small" if backends.is_small(features.numel()) else "",
    )  # fmt: skip
    sums, counts, square_sums = _class_moments(features.detach(), labels, num_classes, ignore_index, line)
    return ClassMoments(sums, counts, square_sums if squares else None)


@torch.library.custom_op("spcl_fast::class_moments", mutates_args=())
def _class_moments(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, line: str
) -> tuple[Tensor, Tensor, Tensor]:
    words = dispatched.words(line)
    ask = Ask(_OP, features.device, features.dtype, num_classes, features.shape[1], "small" in words)
    problem = Moments(features, labels, num_classes, "normalize" in words, ignore_index, "squares" in words)
    return backends.choose(ask, dispatched.named_backend(line)).class_moments(problem)


@_class_moments.register_fake
def _(features, labels, num_classes, ignore_index, line):
    dim = features.shape[1]
    sums = features.new_empty(num_classes, dim, dtype=torch.float32)
    square_sums = features.new_empty(
        (num_classes, dim) if "squares" in dispatched.words(line) else (0,), dtype=torch.float32
    )
    return sums, features.new_empty(num_classes, dtype=torch.int64), square_sums


_class_moments.register_vmap(dispatched.looped_over_batch(_class_moments))
