"""class_moments and move_prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Average, Moments
from ..labels import as_int64, check_range, resize_nearest
from .exact import exact, wide
from .rows import EPS


@exact
def class_moments(problem: Moments) -> tuple[Tensor, Tensor, Tensor]:
    features, labels, num_classes, normalize, ignore_index, squares, pixel_weight = problem
    dtype, (batch, dim, height, width) = wide(features.dtype), features.shape
    given, labels = labels, as_int64(resize_nearest(labels, height, width))
    labelled, _ = check_range(labels, num_classes, ignore_index, given)
    target = labels.where(labelled, num_classes).flatten(1)  # the unlabelled go to a row that is dropped
    sums = features.new_zeros(num_classes + 1, dim, dtype=torch.float64)
    square_sums = torch.zeros_like(sums) if squares else sums.new_empty(0)
    for b in range(batch):
        x = features[b].flatten(1).to(dtype)
        if normalize:
            x = x / x.norm(dim=0).clamp_min(EPS)
        x = x.T.double()
        weight = None if pixel_weight is None else pixel_weight[b].flatten()[:, None].double()
        sums.index_add_(0, target[b], x if weight is None else x * weight)
        if squares:
            square_sums.index_add_(0, target[b], x.square() if weight is None else x.square() * weight)
    counts = _counts(target, num_classes, pixel_weight)
    return sums[:num_classes].float(), counts, square_sums[:num_classes].float()


def _counts(target: Tensor, num_classes: int, pixel_weight: Tensor | None) -> Tensor:
    """[K] int64, or with weights their sums in float32."""
    ones = torch.ones_like(target) if pixel_weight is None else pixel_weight.double()
    counts = ones.new_zeros(num_classes + 1).scatter_add_(0, target.flatten(), ones.flatten())
    return counts[:num_classes].clone() if pixel_weight is None else counts[:num_classes].float()


def move_prototypes(prototypes: Tensor, problem: Moments, average: Average) -> None:
    prototypes.copy_(average.moved(prototypes, *class_moments(problem)[:2]))
