"""class_moments: per class the sum (and the sum of squares) of its pixels' features, and their number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, Moments
from . import checks, dispatched
from .pixels import labels_of, pixel_weight_of, pixels_of

_OP = "class_moments"


class ClassMoments(NamedTuple):
    sums: Tensor  # [K, D] float32
    counts: Tensor  # [K] int64; float32 with pixel_weight
    squares: Tensor | None  # [K, D] float32


def class_moments(
    features: Tensor,  # [B, D, h, w], [N, D], [B, D, L] or [B, D, T, h, w]
    labels: Tensor,  # [B, H, W] or [N], any integer dtype or bool
    num_classes: int,
    *,
    normalize: bool = True,
    squares: bool = False,
    ignore_index: int = 255,
    backend: str | None = None,
    pixel_weight: Tensor | None = None,  # the features' grid or the labels' shape
) -> ClassMoments:
    """Sum of the (unit) features of each class, and how many pixels each has: what a prototype update needs.

        sums_k = sum over pixels with label k of w x/|x|      squares_k = the same of (x/|x|)^2      counts_k = sum of w

    w is 1, and the counts are int64, unless `pixel_weight` is given.
    Not differentiable: prototypes are statistics. Accumulates in float32 or better; the same bits for any number of threads.
    Labels are read at the features' pixels by the nearest rule. `normalize=False` sums x itself.
    Raises as `prototype_contrastive_loss`; on the CPU ValueError for a label outside [0, num_classes) that is not ignore_index.
    Memory: reads the features once; allocates [K, D] and partials of it, nothing of the features' size (Triton: at most 32 MB, or an eighth
    of the features; where that holds fewer than 128 copies of [K, D], some tiles of pixels with many classes are read several times).
    Source: the prototype update of SPCL, arXiv 2111.12358; `train_ours.py` of the released code.
    """
    pixels = pixels_of(_OP, features)
    values = labels_of(_OP, pixels, labels)
    checks.check_options(_OP, ignore_index=ignore_index, backend=backend, normalize=normalize, squares=squares)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"{_OP}: num_classes must be an int of at least 1, got {num_classes!r}")
    weight = pixel_weight_of(_OP, pixels, labels, pixel_weight)
    line = dispatched.line(
        "normalize" if normalize else "", "squares" if squares else "", f"@{backend}" if backend else "",
        "small" if backends.is_small(features.numel()) else "",
    )  # fmt: skip
    weight = None if weight is None else weight.float()
    sums, counts, square_sums = _run(pixels.features.detach(), values, weight, num_classes, ignore_index, line)
    return ClassMoments(sums, counts, square_sums if squares else None)


@torch.library.custom_op("spcl_fast::class_moments", mutates_args=())
def _class_moments(
    features: Tensor, labels: Tensor, pixel_weight: Tensor | None, num_classes: int, ignore_index: int, line: str
) -> tuple[Tensor, Tensor, Tensor]:
    words = dispatched.words(line)
    needs = frozenset() if pixel_weight is None else frozenset(("pixel_weight",))
    ask = Ask(_OP, features.device, features.dtype, num_classes, features.shape[1], "small" in words, needs)
    problem = Moments(
        features, labels, num_classes, "normalize" in words, ignore_index, "squares" in words, pixel_weight
    )
    return backends.choose(ask, dispatched.named_backend(line)).class_moments(problem)


@_class_moments.register_fake
def _(features, labels, pixel_weight, num_classes, ignore_index, line):
    dim = features.shape[1]
    sums = features.new_empty(num_classes, dim, dtype=torch.float32)
    square_sums = features.new_empty(
        (num_classes, dim) if "squares" in dispatched.words(line) else (0,), dtype=torch.float32
    )
    counts = features.new_empty(num_classes, dtype=torch.int64 if pixel_weight is None else torch.float32)
    return sums, counts, square_sums


_class_moments.register_vmap(dispatched.looped_over_batch(_class_moments))
_run = dispatched.direct(_class_moments)
