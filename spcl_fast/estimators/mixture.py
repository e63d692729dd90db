"""GaussianMixture: M diagonal Gaussians per class over unit features, fitted by Sinkhorn and moments instead of gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed, ops
from .assignment import (
    NONE,
    Assignment,
    ClassRows,
    LabelledGrid,
    balanced_assignment,
    class_max,
    labelled_grid,
    own_scores,
    predictions_on,
)  # fmt: skip
from .clusters import spread_around
from .float32 import Float32Statistics
from .ring import counted, enqueue_, over_ranks

FLOOR = 1e-2  # added to each variance, as the authors do


class GaussianMixture(Float32Statistics):
    """log N(u; mean_km, diag(scale_km^2)), u = x/|x|, of M components per class; a class is as likely as its best component.

    num_classes, dim, components  K, D and M of `.means` and `.scales` (standard deviations), [K, M, D] float32 buffers.
    keep        shares of the OLD mean and of the OLD scale in a step. The authors' (0.999, 0.0) belong to their memory.
    memory      0: a step fits the batch's moments, O(K M D). Above 0, as the authors (32000): the last so many features of each component
                are kept and fitted, 4 K M D memory bytes: 6.1 GB for 150 classes, 5 components, 64 channels.
    max_samples of a batch that enter the memory of a component, evenly spaced in the order of pixels (20).
    interval    with a memory, every so many updates refit (5), the classes in the batch alone.
    epsilon, iterations  of Sinkhorn, within a class, on log densities divided by the largest of the class in absolute value.
    A step: f = normalize(sum of features), variance = mean (u - f)^2 + 0.01; mean <- keep mean + (1 - keep) f, normalised; scale likewise
    from the variance's root. With torch.distributed initialised a step sees the pixels of all ranks.

    Memory: what `memory` says, and O(N M) for the assignment; the [N, K M] log densities are never there. No host sync.
    Source: Liang et al., GMMSeg, arXiv 2210.02025; `mmseg/models/decode_heads/gmmseg_head.py` of the authors' code.
    """

    means: Tensor
    scales: Tensor
    queue: Tensor  # [K M, memory, D]
    queue_next: Tensor  # [K M] int64

    def __init__(
        self,
        num_classes: int,
        dim: int,
        components: int = 5,
        *,
        keep: tuple[float, float] = (0.9, 0.9),
        memory: int = 0,
        max_samples: int = 20,
        interval: int = 5,
        epsilon: float = 0.05,
        iterations: int = 3,
        normalize: bool = True,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if min(num_classes, dim, components) < 1:
            raise ValueError(
                f"GaussianMixture: num_classes, dim and components must be at least 1, got {num_classes}, {dim} and {components}"
            )
        if not all(0 <= share <= 1 for share in keep):
            raise ValueError(
                f"GaussianMixture: keep must be two shares in [0, 1], of the mean and of the scale, got {keep}"
            )
        if memory < 0 or max_samples < 1 or interval < 1:
            raise ValueError(
                "GaussianMixture: memory must be at least 0, max_samples and interval at least 1, got "
                f"{memory}, {max_samples} and {interval}"
            )
        self.keep, self.memory, self.max_samples, self.interval = keep, memory, max_samples, interval
        self.epsilon, self.iterations, self.normalize, self.ignore_index = epsilon, iterations, normalize, ignore_index
        self.updates = 0
        self.register_buffer("means", F.normalize(torch.randn(num_classes, components, dim), dim=-1))
        self.register_buffer("scales", torch.ones(num_classes, components, dim))
        queue = torch.randn(num_classes * components, memory, dim) if memory else torch.empty(0, 0, dim)
        self.register_buffer("queue", F.normalize(queue, dim=-1))
        self.register_buffer("queue_next", torch.zeros(len(queue), dtype=torch.int64))

    def rows(self) -> ClassRows:
        """The log densities as the ops take them."""
        return gaussian_rows(self.means, self.scales)

    def assign(self, features: Tensor, labels: Tensor) -> Tensor:
        """The row k M + m of each pixel on the features' grid, int64; -1 without a label. features and labels as in the ops."""
        given, found = self._assignment(features, labels)
        return found.rows().view(given.grid)

    @torch.no_grad()
    def update_(self, features: Tensor, labels: Tensor, predictions: Tensor | None = None) -> Tensor:
        """Fit to one batch -> its rows, assigned before the fit.

        predictions on the features' grid: pixels that are predicted as another class do not count.
        """
        given, found = self._assignment(features, labels)
        rows = found.rows()
        counted = rows
        if predictions is not None:
            counted = rows.masked_fill(
                predictions_on("GaussianMixture", given, predictions).view(rows.shape) != found.labels, NONE
            )
        self._remember(given, counted, found.labels) if self.memory else self._fit_batch(given, counted)
        self.updates += 1
        return rows.view(given.grid)

    def _remember(self, given: LabelledGrid, rows: Tensor, labels: Tensor) -> None:
        features, rows, labels = (over_ranks(value) for value in (given.features, rows, labels))
        enqueue_(self.queue, self.queue_next, features, rows, self.max_samples, normalize=self.normalize)
        if self.updates % self.interval == 0:
            is_there = counted(labels, len(self.means)) > 0
            self._move(fitted(self.queue), is_there.repeat_interleave(self.means.shape[1]))

    def _fit_batch(self, given: LabelledGrid, rows: Tensor) -> None:
        moments = ops.class_moments(
            given.features, rows, self.means[..., 0].numel(), normalize=self.normalize, squares=True, ignore_index=NONE
        )
        assert moments.squares is not None
        parts = [moments.sums, moments.squares, moments.counts]
        distributed.all_reduce_(parts)
        sums, squares, counts = parts
        number = counts.clamp_min(1)[:, None]
        fit = _fit(sums, sums / number, squares / number)
        self._move(fit, (counts > 0) & fit.direction.isfinite().all(1) & fit.scale.isfinite().all(1))

    def _move(self, fit: Fit, is_there: Tensor) -> None:
        means, scales = moved_gaussians(self.means, self.scales, fit, is_there, self.keep)
        self.means, self.scales = F.normalize(means, dim=-1), scales

    def _assignment(self, features: Tensor, labels: Tensor) -> tuple[LabelledGrid, Assignment]:
        given = labelled_grid("GaussianMixture", features, labels, self.ignore_index)
        if given.features.shape[1] != self.means.shape[2]:
            dim = self.means.shape[2]
            raise ValueError(
                f"GaussianMixture: features must be [B, {dim}, h, w] or [N, {dim}], got shape {list(features.shape)}"
            )
        settings = {"epsilon": self.epsilon, "iterations": self.iterations, "normalize": self.normalize}
        return given, component_assignment(given, self.rows(), *self.means.shape[:2], **settings)

    @torch.no_grad()
    def load_(self, means: Tensor) -> GaussianMixture:
        """Start from means [K, M, D], or from [K, D] with a class's M around that one; scales of 1."""
        self.means.copy_(spread_around("GaussianMixture", means, self.means.shape))
        self.scales.fill_(1)
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        self.updates = int(state)

    def extra_repr(self) -> str:
        num_classes, components, dim = self.means.shape
        return f"num_classes={num_classes}, dim={dim}, components={components}, keep={self.keep}, memory={self.memory}"


# ---- the parts, for other people's buffers ------------------------------------------------------------------------------


def gaussian_rows(means: Tensor, scales: Tensor) -> ClassRows:
    """log N(u; mean, diag(scale^2)) = <u, mean/scale^2> - 1/2 <u^2, 1/scale^2> + bias. means and scales [K, M, D] or [R, D]."""
    if means.dim() not in (2, 3) or means.shape != scales.shape:
        raise ValueError(
            f"means and scales must both be [K, M, D] or both [R, D], got shapes {list(means.shape)} and {list(scales.shape)}"
        )
    mean, precision = (
        means.detach().flatten(0, -2).double(),
        scales.detach().flatten(0, -2).double().square().reciprocal(),
    )
    bias = 0.5 * (precision.log() - mean.square() * precision).sum(1) - 0.5 * mean.shape[1] * math.log(2 * math.pi)
    kind = means.dtype
    return ClassRows((mean * precision).to(kind), (-precision).to(kind), bias.to(kind))


def component_assignment(
    given: LabelledGrid, rows: ClassRows, num_classes: int, components: int, *, epsilon: float = 0.05, iterations: int = 3,
    normalize: bool = True,
) -> Assignment:  # fmt: skip
    """Sinkhorn within each class on log densities, divided by the class's largest one in absolute value."""
    scores = own_scores(given, rows, components, normalize=normalize)
    labels = given.labels.masked_fill(~scores.isfinite().all(1), NONE)
    scores = torch.where((labels != NONE)[:, None], scores, 0)
    largest = class_max(scores.abs(), labels, num_classes).amax(1).clamp_min(torch.finfo(scores.dtype).tiny)
    scaled = scores / largest[labels.clamp(0, num_classes - 1)][:, None]
    return balanced_assignment(scaled, labels, num_classes, epsilon=epsilon, iterations=iterations)


class Fit(NamedTuple):
    direction: Tensor  # [R, D], of unit length
    scale: Tensor  # [R, D], the root of the variance about the direction


def fitted(queue: Tensor) -> Fit:
    """Of each component's memory [R, memory, D]; nothing of its size is made."""
    number = queue.shape[1]
    sums = queue.sum(1)
    return _fit(sums, sums / number, torch.linalg.vector_norm(queue, dim=1).square() / number)


def _fit(sums: Tensor, mean: Tensor, mean_square: Tensor) -> Fit:
    direction = F.normalize(sums, dim=1)
    variance = (mean_square - 2 * direction * mean + direction.square()).clamp_min(0)
    return Fit(direction, (variance + FLOOR).sqrt())


def moved_gaussians(
    means: Tensor, scales: Tensor, fit: Fit, is_there: Tensor, keep: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """means and scales [K, M, D] after a step; a row that is not there stays."""
    moved = (
        keep[i] * old.flatten(0, 1) + (1 - keep[i]) * new
        for i, (old, new) in enumerate(((means, fit.direction), (scales, fit.scale)))
    )
    mean, scale = (
        torch.where(is_there[:, None], new, old.flatten(0, 1)) for new, old in zip(moved, (means, scales), strict=True)
    )
    return mean.view(means.shape), scale.view(scales.shape)
