"""mmsegmentation's CrossEntropyLoss, same names, signatures, defaults and denominators: change the import.

    from spcl_fast.compat.mmseg import CrossEntropyLoss

Stands for mmseg/models/losses/cross_entropy_loss.py of mmsegmentation 0.23 to 1.2. Instead of scores at the labels' size it also takes
them at the net's own size: they are up-sampled inside, bilinearly with `align_corners`, and the up-sampled scores are never there. So drop
the `resize` before the loss. Nothing waits for the GPU: the authors read the number of labelled pixels with `.item()`.
Registry: `MODELS.register_module(force=True, module=CrossEntropyLoss)`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

_OVERRIDES = (None, "none", "mean", "sum")


@functools.cache
def averages_by_class_weight() -> bool:
    """Whether the mmsegmentation that is installed divides a mean by the class weights of the labels: from 1.2.0 on. False without any."""
    try:
        major, minor = importlib.metadata.version("mmsegmentation").split(".")[:2]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return (int(major), int(minor)) >= (1, 2)


def get_class_weight(class_weight: Any) -> Any:
    """A list or None as it is; the name of a .npy or .json file: what it holds, as a list. Nothing in a file is run."""
    if not isinstance(class_weight, str):
        return class_weight
    path = Path(class_weight)
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False).tolist()
    if path.suffix == ".json":
        return json.loads(path.read_text())
    raise ValueError(f"class_weight: {path} must be a .npy or .json file; save the weights as one, or pass a list")


def cross_entropy(
    pred: Tensor, label: Tensor, weight: Tensor | None = None, class_weight: Tensor | None = None, reduction: str = "mean",
    avg_factor: Any = None, ignore_index: int = -100, avg_non_ignore: bool = False, *, align_corners: bool = False,
    average_by_class_weight: bool | None = None,
) -> Tensor:  # fmt: skip
    """pred [N, C, h, w] (or [N, C]), label [N, H, W] (or [N]), weight of the labels' shape.

    Quirks kept: "mean" divides by all pixels, ignored ones too, unless avg_non_ignore or avg_factor says otherwise. With class weights it
    divides, from mmsegmentation 1.2.0 on, by the class weights of the labels, as F.cross_entropy does; before, by pixels.
    average_by_class_weight: which of the two; None: as the mmsegmentation that is installed, by pixels where none is.
    Different: an ignored label outside of the classes, such as 255, raises IndexError in 1.2 with class weights, and here counts for
    nothing; avg_non_ignore with nothing labelled is 0, not NaN; a floating label (probabilities) must be [N, C, H, W].
    """
    _check_factor(reduction, avg_factor)
    logits, labels, pixel_weight = _as_maps(pred, label, weight)
    options: dict[str, Any] = {
        "class_weight": class_weight, "pixel_weight": pixel_weight, "ignore_index": ignore_index, "align_corners": align_corners,
    }  # fmt: skip
    if reduction == "mean" and avg_factor is not None:
        return ops.upsampled_cross_entropy(logits, labels, reduction="sum", **options) / avg_factor
    if average_by_class_weight is None:
        average_by_class_weight = averages_by_class_weight()
    if reduction == "mean" and class_weight is not None and average_by_class_weight and not label.is_floating_point():
        denominator: Any = "labelled"
        if not avg_non_ignore and 0 <= ignore_index < pred.shape[1]:  # the ignored pixels' weights are summed, too
            inside = (label >= 0) & (label < pred.shape[1])
            denominator = class_weight.float()[label.where(inside, 0).long()].where(inside, 0.0).sum()
        return ops.upsampled_cross_entropy(logits, labels, reduction="mean", denominator=denominator, **options)
    if reduction == "mean":
        counted = (label != ignore_index).sum().clamp_min(1).to(torch.float32) if avg_non_ignore else "all"
        return ops.upsampled_cross_entropy(logits, labels, reduction="mean", denominator=counted, **options)
    loss = ops.upsampled_cross_entropy(logits, labels, reduction=reduction, **options)
    return loss.view(label.shape) if reduction == "none" and not label.is_floating_point() else loss


def binary_cross_entropy(
    pred: Tensor, label: Tensor, weight: Tensor | None = None, reduction: str = "mean", avg_factor: Any = None,
    class_weight: Tensor | None = None, ignore_index: int = -100, avg_non_ignore: bool = False, *, align_corners: bool = False,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Sigmoid loss of every class. pred [N, C, h, w] with label [N, H, W], or [N, C] with [N]; or label of pred's shape.

    Quirks kept: "mean" divides by all N C H W elements (avg_non_ignore: by those of labelled pixels); class_weight is the pos_weight of
    F.binary_cross_entropy_with_logits. With one channel, labels are 0 and 1. With C > 1, integer labels and no class_weight the one-hot
    labels are never made; otherwise this is plain PyTorch at the labels' size.
    """
    _check_factor(reduction, avg_factor)
    if class_weight is None and pred.dim() != label.dim() and pred.shape[1] > 1 and reduction != "none":
        logits, labels, pixel_weight = _as_maps(pred, label, weight)
        valid = (labels >= 0) & (labels != ignore_index)
        total = ops.upsampled_binary_cross_entropy(
            logits, labels.where(valid, -1), pixel_weight=pixel_weight, ignore_index=-1, reduction="sum", align_corners=align_corners
        )  # fmt: skip
        if reduction == "sum":
            return total
        if avg_factor is None:
            avg_factor = pred.shape[1] * (valid.sum().clamp_min(1) if avg_non_ignore else valid.numel())
        return total / avg_factor
    return _plain_binary(
        pred, label, weight, reduction, avg_factor, class_weight, ignore_index, avg_non_ignore, align_corners
    )


def _plain_binary(
    pred, label, weight, reduction, avg_factor, class_weight, ignore_index, avg_non_ignore, align_corners
) -> Tensor:
    if pred.dim() == 4 and pred.shape[2:] != label.shape[-2:]:
        pred = F.interpolate(pred, label.shape[-2:], mode="bilinear", align_corners=align_corners)
    valid = (label >= 0) & (label != ignore_index)
    target = label
    if pred.dim() != label.dim():
        classes = torch.arange(pred.shape[1], device=pred.device).view(-1, *[1] * (pred.dim() - 2))
        positive = classes if pred.shape[1] > 1 else 1
        target = label.unsqueeze(1) == positive
        valid = valid.unsqueeze(1).expand_as(pred)
        weight = None if weight is None else weight.unsqueeze(1)
    loss = F.binary_cross_entropy_with_logits(pred, target.to(pred.dtype), pos_weight=class_weight, reduction="none")
    loss = loss * (valid if weight is None else valid * weight.float())
    if reduction == "mean":
        return loss.sum() / (
            (valid.sum().clamp_min(1) if avg_non_ignore else loss.numel()) if avg_factor is None else avg_factor
        )
    return loss.sum() if reduction == "sum" else loss


def mask_cross_entropy(
    pred: Tensor, target: Tensor, label: Tensor, reduction: str = "mean", avg_factor: Any = None, class_weight: Tensor | None = None,
    ignore_index: int | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """pred [N, C, ...]: the channel of each object's label against target [N, ...] -> [1]. Plain PyTorch."""
    if ignore_index is not None or reduction != "mean" or avg_factor is not None:
        raise ValueError("mask_cross_entropy: takes neither ignore_index nor avg_factor, and reduction='mean' alone")
    chosen = pred[torch.arange(len(pred), device=pred.device), label].squeeze(1)
    return F.binary_cross_entropy_with_logits(chosen, target, weight=class_weight, reduction="mean")[None]


def _check_factor(reduction: str, avg_factor: Any) -> None:
    if avg_factor is not None and reduction == "sum":
        raise ValueError('avg_factor can not be used with reduction="sum"')


def _as_maps(pred: Tensor, label: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows [N, C] with [N] as one image of N x 1 pixels."""
    weight = None if weight is None else weight.float()
    if pred.dim() == 4:
        return pred, label, weight
    labels = label.t()[None, :, :, None] if label.is_floating_point() else label[None, :, None]
    return pred.t()[None, :, :, None], labels, None if weight is None else weight[None, :, None]


class CrossEntropyLoss(nn.Module):
    """use_sigmoid, use_mask, reduction, class_weight, loss_weight, loss_name, avg_non_ignore: as mmsegmentation's, and so the defaults.

    forward(cls_score, label, weight=None, avg_factor=None, reduction_override=None, ignore_index=-100) -> loss_weight times the loss.
    Shapes as in `cross_entropy`, with use_sigmoid `binary_cross_entropy`, with use_mask `mask_cross_entropy`.
    Quirks kept: `avg_non_ignore=False` divides the mean by all pixels, and the constructor warns about it; the ignored label is -100 unless
    the call says otherwise (mmsegmentation's heads say 255). class_weight may be the name of a .npy or .json file.
    align_corners and average_by_class_weight, of the constructor alone, are ours: for scores smaller than the labels, that of the head's
    `resize` (mmsegmentation's default: False); and what divides a mean with class weights, see `cross_entropy`.
    """

    def __init__(
        self, use_sigmoid: bool = False, use_mask: bool = False, reduction: str = "mean", class_weight: Any = None,
        loss_weight: float = 1.0, loss_name: str = "loss_ce", avg_non_ignore: bool = False, *, align_corners: bool = False,
        average_by_class_weight: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if use_sigmoid and use_mask:
            raise ValueError("CrossEntropyLoss: use_sigmoid and use_mask are two losses; set one of them")
        self.use_sigmoid, self.use_mask, self.reduction = use_sigmoid, use_mask, reduction
        self.loss_weight, self.class_weight = loss_weight, get_class_weight(class_weight)
        self.avg_non_ignore, self.align_corners, self._loss_name = avg_non_ignore, align_corners, loss_name
        self.average_by_class_weight = average_by_class_weight
        self.cls_criterion: Any = (
            binary_cross_entropy if use_sigmoid else mask_cross_entropy if use_mask else cross_entropy
        )
        if not avg_non_ignore and reduction == "mean":
            warnings.warn(
                "avg_non_ignore=False, mmsegmentation's default: the mean divides by all pixels, ignored ones too; "
                "avg_non_ignore=True divides by the labelled ones",
                stacklevel=2,
            )

    def forward(
        self,
        cls_score,
        label,
        weight: Any = None,
        avg_factor=None,
        reduction_override=None,
        ignore_index=-100,
        **kwargs,
    ):
        if reduction_override not in _OVERRIDES:
            raise ValueError(
                f"CrossEntropyLoss: reduction_override must be one of {_OVERRIDES}, got {reduction_override!r}"
            )
        class_weight = None if self.class_weight is None else cls_score.new_tensor(self.class_weight)
        reduction = reduction_override or self.reduction
        if self.use_mask:
            return self.loss_weight * mask_cross_entropy(
                cls_score, label, weight, reduction, avg_factor, class_weight, **kwargs
            )
        if not self.use_sigmoid:
            kwargs["average_by_class_weight"] = self.average_by_class_weight
        return self.loss_weight * self.cls_criterion(
            cls_score, label, weight, class_weight=class_weight, reduction=reduction, avg_factor=avg_factor,
            avg_non_ignore=self.avg_non_ignore, ignore_index=ignore_index, align_corners=self.align_corners, **kwargs,
        )  # fmt: skip

    @property
    def loss_name(self) -> str:
        return self._loss_name

    def extra_repr(self) -> str:
        return f"avg_non_ignore={self.avg_non_ignore}"
