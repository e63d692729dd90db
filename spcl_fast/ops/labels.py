"""Labels before the loss: on another grid, and where a prediction agrees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.labels import check_labels as check_labels
from ..backends.labels import check_range, resize_nearest
from . import checks


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
    if labels.shape[0] != predictions.shape[0]:
        raise ValueError(f"agreement_labels: one image each, got {list(labels.shape)} and {list(predictions.shape)}")
    checks.check_device("agreement_labels", labels, "labels", predictions=predictions)
    return _agreement(labels, predictions, ignore_index, 0 if num_classes is None else num_classes)


@torch.library.custom_op("spcl_fast::agreement_labels", mutates_args=())
def _agreement(labels: Tensor, predictions: Tensor, ignore_index: int, num_classes: int) -> Tensor:
    """An op, because what it raises on a label that is none depends on values. num_classes 0: any label is one."""
    given, labels = labels, resize_nearest(labels, *predictions.shape[1:]).long()
    if num_classes:
        check_range(labels, num_classes, ignore_index, given)
    return labels.where(labels == predictions.long(), ignore_index)


@_agreement.register_fake
def _(labels, predictions, ignore_index, num_classes):
    return predictions.new_empty(predictions.shape, dtype=torch.int64)


def labels_on(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels [B, H, W] of any integer dtype on the grid `size` (height, width), as every op reads them: the nearest rule."""
    checks.check_labels_tensor("labels_on", labels, 3, "[B, H, W]")
    return resize_nearest(labels, *size)
