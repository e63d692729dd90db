"""class_moments: per class the sum (and the sum of squares) of its pixels' features, and their number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.labels import check_range, resize_nearest
from . import checks

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
    sums, counts, square_sums = _class_moments(
        features.detach(), labels, num_classes, normalize, squares, ignore_index, backend or ""
    )
    return ClassMoments(sums, counts, square_sums if squares else None)


@torch.library.custom_op("spcl_fast::class_moments", mutates_args=())
def _class_moments(
    features: Tensor, labels: Tensor, num_classes: int, normalize: bool, squares: bool, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    name = backends.pick(
        _OP,
        backend or None,
        device=features.device,
        dtype=features.dtype,
        num_classes=num_classes,
        dim=features.shape[1],
        has_variances=False,
        small=backends.is_small(features.numel()),
    )
    return backends.module(name).class_moments(
        features, labels, num_classes, normalize=normalize, squares=squares, ignore_index=ignore_index
    )


@_class_moments.register_fake
def _(features, labels, num_classes, normalize, squares, ignore_index, backend):
    dim = features.shape[1]
    sums = features.new_empty(num_classes, dim, dtype=torch.float32)
    square_sums = features.new_empty((num_classes, dim) if squares else (0,), dtype=torch.float32)
    return sums, features.new_empty(num_classes, dtype=torch.int64), square_sums


def move_prototypes_(
    prototypes: Tensor,  # [K, D] float32, contiguous, moved in place
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], any integer dtype
    *,
    keep: float,
    min_pixels: int = 1,
    decay_absent: bool = False,
    normalize: bool = True,
    ignore_index: int = 255,
    backend: str | None = None,
) -> None:
    """prototype_k <- keep * prototype_k + (1 - keep) * (mean (unit) feature of class k), as `PrototypeBank.update_` on one process.

    A class with fewer than `min_pixels` pixels stays, or is multiplied by `keep` where `decay_absent`. No host sync. The cuda backend does
    it in the kernel that adds the partial sums (the features are read once, sums and counts are not written); elsewhere it is
    `class_moments` and `moved_prototypes`. Raises and allocates as `class_moments`.
    """
    checks.check_pixels("move_prototypes_", features, labels)
    checks.check_options(
        "move_prototypes_", ignore_index=ignore_index, backend=backend, normalize=normalize, decay_absent=decay_absent
    )
    _check_prototypes("move_prototypes_", prototypes, features)
    if features.dim() == 2:
        features, labels = features.t()[None, :, :, None], labels[None, :, None]
    _move_prototypes(
        prototypes, features.detach(), labels, keep, min_pixels, decay_absent, normalize, ignore_index, backend or ""
    )


def _check_prototypes(op: str, prototypes: Tensor, features: Tensor) -> None:
    """Moved in place, so neither converted nor copied to where the features are."""
    checks.check_float(op, "prototypes", prototypes, (2,), "[K, D]")
    checks.check_device(op, features, "features", prototypes=prototypes)
    if prototypes.dtype != torch.float32 or not prototypes.is_contiguous():
        layout = "contiguous" if prototypes.is_contiguous() else "not contiguous"
        raise ValueError(f"{op}: prototypes must be contiguous and float32, got {prototypes.dtype}, {layout}")
    if prototypes.shape[1] != features.shape[1]:
        raise ValueError(
            f"{op}: prototypes and features must agree in their channels, got {list(prototypes.shape)} and {list(features.shape)}"
        )


@torch.library.custom_op("spcl_fast::move_prototypes_", mutates_args=("prototypes",))
def _move_prototypes(
    prototypes: Tensor, features: Tensor, labels: Tensor, keep: float, min_pixels: int, decay_absent: bool, normalize: bool,
    ignore_index: int, backend: str,
) -> None:  # fmt: skip
    num_classes, dim = prototypes.shape
    what = {
        "device": features.device,
        "dtype": features.dtype,
        "num_classes": num_classes,
        "dim": dim,
        "has_variances": False,
    }
    module = backends.module(backends.pick(_OP, backend or None, small=backends.is_small(features.numel()), **what))
    settings = {"normalize": normalize, "ignore_index": ignore_index}
    if hasattr(module, "move_prototypes"):
        average = {"keep": keep, "min_pixels": min_pixels, "decay_absent": decay_absent}
        return module.move_prototypes(prototypes, features, labels, **average, **settings)
    sums, counts, _ = module.class_moments(features, labels, num_classes, squares=False, **settings)
    prototypes.copy_(
        moved_prototypes(prototypes, sums, counts, keep=keep, min_pixels=min_pixels, decay_absent=decay_absent)
    )


@_move_prototypes.register_fake
def _(prototypes, features, labels, keep, min_pixels, decay_absent, normalize, ignore_index, backend):
    return None


def moved_prototypes(
    prototypes: Tensor, sums: Tensor, counts: Tensor, *, keep: float, min_pixels: int, decay_absent: bool
) -> Tensor:
    """The moving average itself: prototypes and sums [K, D], counts [K] -> [K, D]."""
    present = (counts >= min_pixels)[:, None]
    mean = sums / counts.clamp_min(1)[:, None]
    moved = keep * prototypes + (1 - keep) * mean
    return torch.where(present, moved, keep * prototypes if decay_absent else prototypes)


def agreement_labels(
    labels: Tensor, predictions: Tensor, *, num_classes: int | None = None, ignore_index: int = 255
) -> Tensor:
    """Labels at the predictions' size, with ignore_index where the prediction differs: the source mask of SPCL.

    labels [B, H, W] of any integer dtype and size (nearest rule), predictions [B, h, w] integer -> [B, h, w] int64.
    With num_classes a label outside [0, num_classes) that is not ignore_index is met as in `class_moments`, not ignored.
    Source: `src_mask` in `train_ours.py` of the released code.
    """
    checks.check_labels_tensor("agreement_labels", labels, 3, "[B, H, W]")
    checks.check_labels_tensor("agreement_labels", predictions, 3, "[B, h, w]", "predictions")
    if len(labels) != len(predictions):
        raise ValueError(f"agreement_labels: one image each, got {list(labels.shape)} and {list(predictions.shape)}")
    checks.check_device("agreement_labels", labels, "labels", predictions=predictions)
    given, labels = labels.shape[1:], resize_nearest(labels, *predictions.shape[1:]).long()
    if num_classes is not None:
        check_range(labels, num_classes, ignore_index, given)
    return labels.where(labels == predictions.long(), ignore_index)


def labels_on(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels [B, H, W] of any integer dtype on the grid `size` (height, width), as every op reads them: the nearest rule."""
    checks.check_labels_tensor("labels_on", labels, 3, "[B, H, W]")
    return resize_nearest(labels, *size)
