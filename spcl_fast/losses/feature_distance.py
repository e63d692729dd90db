"""How far the features of a net are from those of a frozen encoder, on the pixels of some classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import checks
from ..ops.majority import majority_labels

_LOSS = "feature_distance"


def feature_distance(
    features: Tensor,  # [B, D, h, w]
    anchors: Tensor,  # [B, D, h, w]
    labels: Tensor,  # [B, H, W], any integer dtype
    *,
    counted: Tensor,  # [K], bool
    min_ratio: float = 0.75,
    ignore_index: int = 255,
    denominator: Tensor | None = None,  # []
) -> Tensor:  # []
    """mean over counted cells of |x - a|_2,   0 where no cell counts.

    features x and anchors a [B, D, h, w], the latter of a frozen encoder and without a gradient; labels [B, H, W] integer; counted [K]
    bool -> [] float32 (float64 for float64 features). A cell counts where at least `min_ratio` of its pixels have one class and
    counted[class]; `counted_cells` are these. denominator: what the sum is divided by instead of their number.
    Raises ValueError or TypeError for what does not fit, and as `majority_labels`. Memory: some three copies of the features; no host sync.
    Source: DAFormer, arXiv 2111.14887 (weight 0.005, the classes of things; its mean over no cell is NaN).
    """
    if features.shape != anchors.shape or features.dim() != 4:
        raise ValueError(
            f"{_LOSS}: features and anchors must be two [B, D, h, w] of one shape, got {list(features.shape)} and {list(anchors.shape)}"
        )
    cells = counted_cells(labels, features.shape[2:], counted=counted, min_ratio=min_ratio, ignore_index=ignore_index)
    if len(cells) != len(features):
        raise ValueError(f"{_LOSS}: {len(features)} images of features, but {len(labels)} of labels")
    wide = checks.wide(features)
    apart = (features.to(wide) - anchors.detach().to(wide)).where(cells[:, None], 0)  # a NaN elsewhere does not count
    return torch.linalg.vector_norm(apart, dim=1).sum() / (
        cells.sum().clamp_min(1) if denominator is None else denominator
    )


def counted_cells(
    labels: Tensor, grid: tuple[int, ...], *, counted: Tensor, min_ratio: float = 0.75, ignore_index: int = 255
) -> Tensor:
    """labels [B, H, W] -> bool [B, h, w], see `feature_distance`. Where H or W is no multiple of the cells, the last ones do not count."""
    if counted.dim() != 1 or counted.dtype != torch.bool:
        raise ValueError(f"{_LOSS}: counted must be bool [K], got {counted.dtype} {list(counted.shape)}")
    scale = max(-(-size // cells) for size, cells in zip(labels.shape[1:], grid, strict=True))
    found = majority_labels(labels, scale, num_classes=len(counted), min_ratio=min_ratio, ignore_index=ignore_index)
    whole = found.new_full((len(labels), *grid), ignore_index)
    whole[:, : found.shape[1], : found.shape[2]] = found
    labelled = whole != ignore_index
    return labelled & counted[whole.where(labelled, 0)]
