"""What a pixel's logits are held against: a class, probabilities, or probabilities that a teacher's features and prototypes give."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Contrast, Teacher
from ..labels import as_int64, check_probabilities, check_range, resize_nearest
from .exact import matmul


class Goal(NamedTuple):
    labelled: Tensor  # [B, P] bool
    index: Tensor | None  # [B, P]: the class, 0 where there is none; None for probabilities
    factor: Tensor  # [B, P]: what multiplies a pixel's loss before the pixel weight
    counted: Tensor  # [B, P]: what a pixel adds to the mean's denominator
    any_bad: Tensor | None  # [] bool on a GPU

    def classes(self, b: int) -> Tensor:
        """[P] of image b, where the labels are classes."""
        assert self.index is not None
        return self.index[b]


def is_soft(contrast: Contrast) -> bool:
    """Whether the target is more than one class with weight 1."""
    hard = isinstance(contrast.labels, Tensor) and not contrast.labels.is_floating_point()
    return not hard or contrast.label_smoothing > 0 or contrast.loss == "sigmoid"


def goal_of(contrast: Contrast, dtype: torch.dtype, check: bool = True) -> Goal:
    """check: raise on, or flag, what is no label; the backward has seen it in the forward."""
    c, labels = contrast, contrast.labels
    if isinstance(labels, Teacher):
        labelled = torch.ones_like(labels.u, dtype=torch.bool)
        return Goal(labelled, None, labelled.to(dtype), labelled.to(dtype), None)
    if labels.is_floating_point():
        any_bad = check_probabilities(labels) if check else None
        labelled = (labels != 0).any(1).flatten(1)
        return Goal(labelled, None, labelled.to(dtype), labelled.to(dtype), any_bad)
    given, labels = labels, as_int64(resize_nearest(labels, *c.features.shape[2:]))
    if check:
        labelled, any_bad = check_range(labels, c.num_classes, c.ignore_index, given)
    else:
        labelled, any_bad = (labels != c.ignore_index) & (labels >= 0) & (labels < c.num_classes), None
    labelled, index = labelled.flatten(1), labels.where(labelled, 0).flatten(1)
    ones = labelled.to(dtype)
    weight = ones if c.class_weight is None else ones * c.class_weight.to(dtype)[index]
    return Goal(labelled, index, ones if is_soft(c) else weight, ones if c.loss == "sigmoid" else weight, any_bad)


def targets_of_image(contrast: Contrast, goal: Goal, b: int, dtype: torch.dtype) -> Tensor:
    """t [K, P] of image b, smoothed."""
    c, labels = contrast, contrast.labels
    if isinstance(labels, Teacher):
        scores = matmul(labels.prototypes.to(dtype), labels.features[b].flatten(1).to(dtype)) / labels.temperature
        target = (scores + labels.v[:, None] + labels.u[b]).exp().to(dtype)
    elif goal.index is None:
        target = labels[b].flatten(1).to(dtype)
    else:
        target = torch.zeros(c.num_classes, goal.index.shape[1], dtype=dtype, device=labels.device)
        target.scatter_(0, goal.index[b, None], 1.0)
    return smoothed(target, c.label_smoothing)


def smoothed(target: Tensor, label_smoothing: float) -> Tensor:
    """t [K, ...] as torch.nn.functional.cross_entropy smooths it."""
    return target * (1 - label_smoothing) + label_smoothing / len(target) if label_smoothing else target


def soft_loss(z: Tensor, target: Tensor, class_weight: Tensor | None, kind: str) -> Tensor:
    """z, target [K, P] -> [P]. In the softmax a class whose weighted target is 0 adds nothing, whatever its logit."""
    weight = 1 if class_weight is None else class_weight.to(z.dtype)[:, None]
    if kind == "sigmoid":
        terms = weight * (softplus(z) - torch.where(target == 0, 0, target * z))
    else:
        target = weight * target
        terms = torch.where(target == 0, 0, target * negative_log_softmax(z))
    return terms.sum(0, dtype=torch.float64).to(z.dtype)


def soft_residual(z: Tensor, target: Tensor, class_weight: Tensor | None, kind: str) -> Tensor:
    """The gradient of `soft_loss` in z."""
    if kind == "sigmoid":
        residual = sigmoid(z) - target
        return residual if class_weight is None else residual * class_weight.to(z.dtype)[:, None]
    if class_weight is not None:
        target = target * class_weight.to(z.dtype)[:, None]
    return softmax(z) * target.sum(0, dtype=torch.float64).to(z.dtype) - target


def sigmoid(z: Tensor) -> Tensor:
    """torch's has other bits where another thread ends."""
    e = z.abs().neg().exp()
    return torch.where(z >= 0, 1, e) / (1 + e)


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)). That of torch is z above 20, which float64 sees."""
    return -torch.nn.functional.logsigmoid(-z)


def negative_log_softmax(z: Tensor) -> Tensor:
    """z [K, P] -> [K, P], by the maximum as `softmax`: the small loss of a pixel that is sure is not a difference of two large numbers."""
    below = z - z.amax(0)
    return below.exp().sum(0, dtype=torch.float64).log().to(z.dtype) - below


def softmax(z: Tensor) -> Tensor:
    """By the maximum and not by lse, which is rounded: at a low temperature that would be seen."""
    weight = (z - z.amax(0)).exp()
    return weight.div_(weight.sum(0, dtype=torch.float64).to(z.dtype))
