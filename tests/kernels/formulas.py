"""The losses of `backends/contract.py` written out plainly with autograd, in any dtype: a second opinion next to `reference`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spcl_fast.backends.contract import Contrast, Logits, Teacher, UpsampledLoss
from spcl_fast.backends.labels import resize_nearest


def row_logits(p: Contrast | Logits, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """s without the variance term, and that term: [B, P, M] each."""
    batch = p.features.shape[0]
    x = p.features.to(dtype).flatten(2).mT
    if p.normalize:
        x = F.normalize(x, dim=2)
    s = x @ p.prototypes.to(dtype).expand(batch, *p.prototypes.shape[-2:]).mT / p.temperature
    if p.bias is not None:
        s = s + p.bias.to(dtype).expand(batch, p.bias.shape[-1])[:, None]
    if p.variances is None:
        return s, torch.zeros_like(s)
    return s, 0.5 * x.square() @ p.variances.to(dtype).expand(batch, *p.variances.shape[-2:]).mT / p.temperature**2


def pooled(s: Tensor, p: Contrast | Logits) -> Tensor:
    if p.prototype_class is None:
        return s
    parts = [s[..., p.prototype_class == k] for k in range(p.classes)]
    empty = torch.full_like(s[..., 0], -torch.inf)
    if p.pool == "max":
        return torch.stack([part.max(-1).values if part.shape[-1] else empty for part in parts], -1)
    return torch.stack([part.logsumexp(-1) if part.shape[-1] else empty for part in parts], -1)


def logits(p: Logits, dtype: torch.dtype) -> Tensor:
    z = pooled(sum(row_logits(p, dtype)), p)
    return z.mT.unflatten(2, p.features.shape[2:])


def hard_labels(c: Contrast) -> Tensor:
    return resize_nearest(c.labels, *c.features.shape[2:]).long().flatten(1)


def targets(c: Contrast, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """t [B, P, K], and which pixels have a label."""
    if isinstance(c.labels, Teacher):
        t = c.labels
        scores = t.features.to(dtype).flatten(2).mT @ t.prototypes.to(dtype).mT / t.temperature
        probabilities = (scores + t.u.to(dtype)[..., None] + t.v.to(dtype)).exp()
        return probabilities, torch.ones_like(probabilities[..., 0], dtype=torch.bool)
    if c.labels.is_floating_point():
        probabilities = c.labels.to(dtype).flatten(2).mT
        return probabilities, probabilities.sum(-1) != 0
    labels = hard_labels(c)
    labelled = labels != c.ignore_index
    return F.one_hot(labels.where(labelled, 0), c.num_classes).to(dtype), labelled


def weighted(value: Tensor, t: Tensor) -> Tensor:
    """t * value, 0 where t is: a class of logit -inf that nobody aims at."""
    return torch.where(t == 0, 0, t * value)


def contrast(c: Contrast, dtype: torch.dtype) -> Tensor:
    s, variance = row_logits(c, dtype)
    t, labelled = targets(c, dtype)
    if c.margin:
        owner = torch.arange(s.shape[-1]) if c.prototype_class is None else c.prototype_class
        s = s - c.margin / c.temperature * (owner == hard_labels(c)[..., None]).to(dtype)
    z = pooled(s + variance, c)
    weight = torch.ones(c.num_classes, dtype=dtype) if c.class_weight is None else c.class_weight.to(dtype)
    smooth = (1 - c.label_smoothing) * t + c.label_smoothing / c.num_classes
    if c.loss == "sigmoid":
        nll = (weight * (F.softplus(z, threshold=1e9) - weighted(z, smooth))).sum(-1)
    else:
        nll = -(weight * weighted(z.log_softmax(-1), smooth)).sum(-1)
    if not c.positive_variance:
        nll = nll + (weight * t * variance).sum(-1)
    if c.pixel_weight is not None:
        nll = nll * c.pixel_weight.to(dtype).flatten(1)
    counts_pixels = isinstance(c.labels, Teacher) or c.labels.is_floating_point() or c.loss == "sigmoid"
    counted = labelled.to(dtype) if counts_pixels else (weight * t).sum(-1) * labelled
    return reduced(nll.where(labelled, 0).view(-1, *c.features.shape[2:]), counted, c)


def reduced(nll: Tensor, counted: Tensor, p: Contrast | UpsampledLoss) -> Tensor:
    if p.reduction == "none":
        return nll
    if p.reduction == "sum":
        return nll.sum()
    return nll.sum() / (counted.sum() if p.denominator is None else p.denominator.to(nll.dtype))


def upsampled(p: UpsampledLoss, dtype: torch.dtype, binary: bool) -> Tensor:
    up = (
        F.interpolate(p.logits.to(dtype), p.output_size, mode="bilinear", align_corners=p.align_corners) / p.temperature
    )
    num_classes = up.shape[1]
    if p.labels.is_floating_point():
        t = F.interpolate(p.labels.to(dtype), p.output_size, mode="bilinear", align_corners=p.align_corners)
        labelled = t.sum(1) != 0
    else:
        labelled = p.labels != p.ignore_index
        t = F.one_hot(p.labels.long().where(labelled, 0), num_classes).movedim(3, 1).to(dtype)
    weight = torch.ones(num_classes, dtype=dtype) if p.class_weight is None else p.class_weight.to(dtype)
    weight = weight[:, None, None]
    smooth = (1 - p.label_smoothing) * t + p.label_smoothing / num_classes
    if binary:
        probability = up.sigmoid()
        wrong = probability * (1 - smooth) + (1 - probability) * smooth
        each = F.binary_cross_entropy_with_logits(up, smooth, reduction="none") * wrong**p.gamma
        nll = (weight * each).sum(1)
    else:
        nll = -(weight * weighted(up.log_softmax(1), smooth)).sum(1)
    if p.pixel_weight is not None:
        nll = nll * p.pixel_weight.to(dtype)
    counts_pixels = binary or p.labels.is_floating_point()
    counted = labelled.to(dtype) if counts_pixels else (weight * t).sum(1) * labelled
    return reduced(nll.where(labelled, 0), counted, p)
