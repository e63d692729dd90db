"""A problem of the ops (`Contrast`, `Logits`; any struct with their fields) as operands of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..operands import Map, Probabilities, Prototypes, Target, TeacherPointers, feature_map, labels_at, size_of

RESIDENT_DIM = 512  # channels of a pixel tile that is held on chip
LSE_DTYPE = torch.float64


class FeatureMap(NamedTuple):
    """A `Map` in another order. Numbers that share eight aligned bytes of a kernel's parameters are loaded as one and kept as one: with the
    pointer between the strides, and each size next to the one that it is used with, sm_90 takes up to 6 registers fewer."""

    stride_b: int
    ptr: Tensor | None
    stride_d: int
    stride_h: int | None
    stride_w: int


class Sizes(NamedTuple):
    """A `Size` in another order, see `FeatureMap`."""

    P: int
    D: int
    K: int
    w: int


def features_of(tensor: Tensor) -> FeatureMap:
    return FeatureMap(**feature_map(tensor)._asdict())


def sizes_of(features: Tensor, num_classes: int) -> Sizes:
    return Sizes(**size_of(features, num_classes)._asdict())


def prototypes_of(problem) -> Prototypes:
    margin = getattr(problem, "margin", 0.0)
    tau, bias, variances = problem.temperature, problem.bias, problem.variances
    on_device = isinstance(tau, Tensor)
    per_image = problem.prototypes.dim() == 3
    prototypes = problem.prototypes.detach()
    labels = getattr(problem, "labels", None)
    if labels is None or isinstance(labels, Tensor):  # a teacher has very many classes: no copy of them is made
        prototypes = prototypes.to(problem.features.dtype)
    return Prototypes(
        prototypes.contiguous(),
        problem.prototypes.shape[1] * problem.prototypes.shape[2] if per_image else None,
        1.0 if on_device else 1 / tau,
        tau.detach() if on_device else None,
        None if bias is None else bias.detach().contiguous(),
        bias.shape[1] if bias is not None and bias.dim() == 2 else None,
        None if variances is None else variances.detach().float().contiguous(),
        float(margin) if margin else None,
    )


def target_of(contrast, flag: Tensor, bad_probability: int) -> Target:
    features, labels = contrast.features, contrast.labels
    height, width = features.shape[2:]
    smoothing, sigmoid = contrast.label_smoothing, contrast.loss == "sigmoid"
    target = Target(
        None, None, None, None, 1 - smoothing, smoothing / contrast.num_classes, None,
        1 if sigmoid else None, None if contrast.positive_variance or contrast.variances is None else 1,
    )  # fmt: skip
    if not isinstance(labels, Tensor):
        return target._replace(teacher=_teacher(labels))
    if labels.is_floating_point():
        return target._replace(probabilities=Probabilities(labels, *labels.stride(), flag, bad_probability))
    plain = None if sigmoid or smoothing else 1
    return target._replace(labels=labels_at(labels, flag, height, width, contrast.ignore_index), plain=plain)


def _teacher(teacher) -> TeacherPointers:
    """Scores with float32's digits, whatever the dtypes: at a low temperature what half floats round off would be seen in every target."""
    features, prototypes = teacher.features, teacher.prototypes.contiguous()
    dots = Prototypes(
        prototypes, None, 1 / teacher.temperature, None, None, None, None, None, wide(features, prototypes)
    )
    return TeacherPointers(
        Map(features, *features.stride()),
        dots,
        features.shape[1],
        teacher.u.double().contiguous(),
        teacher.v.contiguous(),
    )


def wide(features: Tensor, prototypes: Tensor) -> int | None:
    """Whether the two meet in float32, because they are not in one dtype."""
    return 1 if prototypes.dtype != features.dtype else None


def is_wide(target: Target) -> bool:
    """Whether a teacher's products are float32's: tiles of half floats would spill."""
    return target.teacher is not None and target.teacher.prototypes.wide is not None


def holds_tile(features: Tensor) -> bool:
    """Whether a pixel tile stays on chip. FMA dots hold whole operand rows in registers: not for float32."""
    return features.dtype != torch.float32 and features.shape[1] <= RESIDENT_DIM


def saves_logits(contrast) -> bool:
    """Whether 4 M bytes per pixel are saved for the backward: where they are at most half of the features' bytes and the tile cannot stay
    on chip (a backward that forms them again does it once per block of 256 output channels, and for the prototypes once more).
    Logits with a variance term are not: the backward needs their parts. Rows that are pooled always are."""
    if contrast.prototype_class is not None:
        return True
    few = contrast.prototypes.shape[-2] * 8 <= contrast.features.shape[1] * contrast.features.element_size()
    return few and contrast.variances is None and not holds_tile(contrast.features)
