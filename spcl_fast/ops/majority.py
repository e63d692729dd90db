"""majority_labels: labels on a coarser grid, where one class holds most of a cell."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.labels import check_range
from . import checks

_OP = "majority_labels"


def majority_labels(
    labels: Tensor,  # [B, H, W], any integer dtype
    scale: int,
    *,
    num_classes: int,
    min_ratio: float = 0.75,
    ignore_index: int = 255,
) -> Tensor:  # [B, H // scale, W // scale] int64
    """The class that holds at least `min_ratio` of a cell of scale x scale pixels, ignore_index where none does.

    Ignored pixels count in the cell; of equally frequent classes the lowest wins; rows and columns beyond whole cells are left out.
    Raises ValueError or TypeError for what does not fit; on the CPU ValueError for a label outside [0, num_classes) that is not
    ignore_index (on a GPU `check_labels` reports it, and it counts as ignored).
    Memory: some 20 bytes per label; the one-hot map of the authors' code takes 12 (num_classes + 1).
    Source: `downscale_label_ratio` of DAFormer, arXiv 2111.14887, and SePiCo, arXiv 2204.08808.
    """
    checks.check_labels_tensor(_OP, labels, 3, "[B, H, W]")
    checks.check_share(_OP, "min_ratio", min_ratio)
    checks.check_options(_OP, ignore_index=ignore_index, backend=None)
    for name, value in (("scale", scale), ("num_classes", num_classes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{_OP}: {name} must be an int of at least 1, got {value!r}")
    if min(labels.shape[1:]) < scale:
        raise ValueError(f"{_OP}: labels must hold a cell of {scale} x {scale} pixels, got shape {list(labels.shape)}")
    return _majority_labels(checks.as_integers(labels), scale, num_classes, float(min_ratio), ignore_index)


@torch.library.custom_op("spcl_fast::majority_labels", mutates_args=())
def _majority_labels(labels: Tensor, scale: int, num_classes: int, min_ratio: float, ignore_index: int) -> Tensor:
    """An op, because what it raises on a label that is none depends on values."""
    batch, height, width = labels.shape
    labels = labels.long()
    labelled, _ = check_range(labels, num_classes, ignore_index)
    labels = labels.where(labelled, num_classes).to(torch.uint8 if num_classes < 256 else torch.int32)
    rows, columns = height // scale, width // scale
    cells = labels[:, : rows * scale, : columns * scale].reshape(batch, rows, scale, columns, scale)
    cells = cells.transpose(2, 3).flatten(3)
    found, count = _most_frequent(cells) if min_ratio > 0.5 else _lowest_most_frequent(cells)
    # the share in float32, as the mean over a cell of a one-hot map is
    share = count / torch.full((), scale * scale, dtype=torch.float32, device=count.device)
    return found.long().where((share >= min_ratio) & (found != num_classes), ignore_index)


@_majority_labels.register_fake
def _(labels, scale, num_classes, min_ratio, ignore_index):
    batch, height, width = labels.shape
    return labels.new_empty((batch, height // scale, width // scale), dtype=torch.int64)


def _most_frequent(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Value and count [B, h, w]; of equally frequent values any."""
    found = cells.mode(-1).values
    return found, (cells == found[..., None]).sum(-1)


def _lowest_most_frequent(cells: Tensor) -> tuple[Tensor, Tensor]:
    """The same; of equally frequent values the lowest: the first of the longest runs of the sorted cell."""
    cells = cells.sort(-1).values
    place = torch.arange(cells.shape[-1], device=cells.device)
    starts = torch.ones_like(cells, dtype=torch.bool)
    starts[..., 1:] = cells[..., 1:] != cells[..., :-1]
    run = place - torch.where(starts, place, 0).cummax(-1).values
    longest = run.argmax(-1, keepdim=True)
    return cells.gather(-1, longest)[..., 0], run.gather(-1, longest)[..., 0] + 1
