"""The paper's formulas in float64 by plain autograd, and the same formulas eagerly in a given dtype: what every backend is judged by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resized(labels: Tensor, height: int, width: int) -> Tensor:
    """Nearest rule, by the function that defines it (float64 holds every label exactly)."""
    return F.interpolate(labels[:, None].double(), (height, width), mode="nearest")[:, 0].long()


def reduced(
    nll: Tensor, labels: Tensor, num_classes: int, class_weight, pixel_weight, ignore_index: int, reduction: str
) -> Tensor:
    labelled = labels != ignore_index
    weight = torch.ones(num_classes, dtype=nll.dtype) if class_weight is None else class_weight.to(nll.dtype)
    weight = weight[labels.where(labelled, 0)] * labelled
    loss = torch.where(labelled, nll * weight * (1 if pixel_weight is None else pixel_weight.to(nll.dtype)), 0)
    if reduction == "none":
        return loss
    return loss.sum() / weight.sum() if reduction == "mean" else loss.sum()


def contrast(
    features, labels, prototypes, *, temperature, normalize=True, ignore_index=255, class_weight=None, pixel_weight=None, variances=None,
    reduction="mean", dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """The loss as the paper writes it, on [N, D] rows, in `dtype`; differentiable by autograd."""
    num_classes = len(prototypes)
    if features.dim() == 2:
        rows, shape = features.to(dtype), features.shape[:1]
    else:
        labels = resized(labels, *features.shape[2:])
        rows, shape = features.to(dtype).permute(0, 2, 3, 1).flatten(0, 2), labels.shape
    if normalize:
        rows = F.normalize(rows, dim=1)
    logits = rows @ prototypes.to(dtype).T / temperature
    if variances is not None:
        logits = logits + 0.5 * rows.square() @ variances.to(dtype).T / temperature**2
    labels = labels.reshape(shape).long()
    target = labels.where(labels != ignore_index, 0).flatten()
    nll = F.cross_entropy(logits, target, reduction="none").view(shape)
    return reduced(nll, labels, num_classes, class_weight, pixel_weight, ignore_index, reduction)


def laid_out(features: Tensor, labels: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same values [B, D, H, W] as they may lie in memory; for "rows" as [B * H * W, D] with the labels [B, H, W] flat."""
    height, width = features.shape[2:]
    if layout == "channels_last":
        return features.contiguous(memory_format=torch.channels_last), labels
    if layout == "sliced":
        return F.pad(features, (2, 3, 1, 1), value=torch.nan)[:, :, 1 : height + 1, 2 : width + 2], labels
    if layout == "transposed":
        return features.transpose(2, 3).contiguous().transpose(2, 3), labels
    if layout == "rows":
        return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]), labels.flatten()
    if layout == "misaligned":
        return torch.cat([features.new_zeros(1), features.flatten()])[1:].view(features.shape), labels
    if layout == "every other image":
        return features.repeat_interleave(2, 0)[::2], labels
    raise ValueError(layout)


def moments(features, labels, num_classes, *, normalize=True, ignore_index=255, dtype=torch.float64):
    """sums [K, D], counts [K], squares [K, D] by a one-hot product."""
    if features.dim() == 4:
        labels = resized(labels, *features.shape[2:])
        features = features.permute(0, 2, 3, 1).flatten(0, 2)
    rows, labels = features.to(dtype), labels.flatten().long()
    if normalize:
        rows = F.normalize(rows, dim=1)
    one_hot = F.one_hot(labels.where(labels != ignore_index, num_classes), num_classes + 1)[:, :num_classes].to(dtype)
    return one_hot.T @ rows, one_hot.sum(0).long(), one_hot.T @ rows.square()


def upsampled(
    logits, labels, *, temperature=1.0, align_corners=True, ignore_index=255, class_weight=None, pixel_weight=None, reduction="mean",
    dtype=torch.float64,
) -> Tensor:  # fmt: skip
    up = F.interpolate(logits.to(dtype), labels.shape[1:], mode="bilinear", align_corners=align_corners) / temperature
    labels = labels.long()
    nll = F.cross_entropy(up, labels.where(labels != ignore_index, 0), reduction="none")
    return reduced(nll, labels, logits.shape[1], class_weight, pixel_weight, ignore_index, reduction)


def assert_as_accurate(got: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0, slack: float = 4.0) -> None:
    """`got` may be `factor` times worse than same-dtype eager PyTorch, both judged by the float64 `truth`, plus a few eps of its scale."""
    truth = truth.double()
    assert got.shape == truth.shape
    error = (got.double() - truth).abs().max().item() if got.numel() else 0.0
    allowed = (eager.double() - truth).abs().max().item() if got.numel() else 0.0
    scale = truth.abs().max().item() if got.numel() else 0.0
    limit = factor * allowed + slack * torch.finfo(got.dtype).eps * scale
    assert error <= limit, f"error {error:.3e} against float64; same-dtype eager has {allowed:.3e}, limit {limit:.3e}"
