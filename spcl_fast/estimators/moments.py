"""ProtoEstimator: cumulative mean and variance of each class's features, merged exactly batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .moving import ExactBuffers, is_distributed, move_buffers_, summed_over_ranks


class BatchMoments(NamedTuple):
    """Of a batch, or of a part of one: parts add up."""

    sums: Tensor  # [K, D]
    counts: Tensor  # [K]
    squares: Tensor  # [K, D]


class ProtoEstimator(ExactBuffers):
    """Mean and variance of every feature of a class that was ever seen, as one pass over all of them would give.

        n, m, v       pixels of class k in the batch, their mean and (biased) variance
        w             n / (n + amount)
        variance   <- (1 - w) variance + w v + w (1 - w) (m - mean)^2        (Chan's merge; mean is still the old one)
        mean       <- (1 - w) mean + w m,   amount <- amount + n

    num_classes, dim  K and D of the buffers `mean` and `variance` [K, D] and `amount` [K], which start at 0 and are float64: after a
                      million pixels the steps of a float32 mean would be lost. `prototypes` and `variances` are float32 copies.
    min_pixels        a class with fewer pixels in the batch counts as absent.
    normalize         of unit features (as SePiCo's projection head gives) or of the features themselves (as SDCA).

    An absent class, and one whose batch sum is not finite, keeps its statistics. With torch.distributed initialised, the batch is that of
    all ranks, in one all-reduce. Each update makes new buffers, so a loss recorded before it keeps what it has seen. No host sync.
    v is a difference of float32 sums: off by about 1e-7 (1 + m^2 / v) of itself.
    Memory: the features are read once and nothing of their size is made; [K, D] sums. The authors' code makes three tensors [N, K, D].
    Source: SePiCo, arXiv 2204.08808; SDCA, arXiv 2105.05013; ProCA, arXiv 2207.06654 (the mean alone); Chan et al., 1979.
    """

    mean: Tensor
    variance: Tensor
    amount: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        min_pixels: int = 1,
        normalize: bool = True,
        ignore_index: int = 255,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1 or dim < 1 or min_pixels < 1:
            raise ValueError(
                f"ProtoEstimator: num_classes, dim and min_pixels must be at least 1, got {num_classes}, {dim} and {min_pixels}"
            )
        self.min_pixels = min_pixels
        self.normalize = normalize
        self.ignore_index = ignore_index
        self.backend = backend
        self.register_buffer("mean", torch.zeros(num_classes, dim, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros(num_classes, dim, dtype=torch.float64))
        self.register_buffer("amount", torch.zeros(num_classes, dtype=torch.float64))

    @property
    def prototypes(self) -> Tensor:
        """[K, D] float32: the mean of each class."""
        return self.mean.float()

    @property
    def variances(self) -> Tensor:
        """[K, D] float32."""
        return self.variance.float()

    @torch.no_grad()
    def update_(self, features: Tensor, labels: Tensor) -> ProtoEstimator:
        """Merge a batch. features [B, D, h, w] or [N, D]; labels [B, H, W] or [N], integer, any size.

        Raises as `class_moments`, and ValueError for features of another D.
        """
        return self.merge_(self.moments(features, labels))

    @torch.no_grad()
    def update_in_parts_(self, parts: Iterable[tuple[Tensor, Tensor]]) -> ProtoEstimator:
        """Merge a batch that comes in parts (features, labels); one part is alive at a time."""
        first, *others = (self.moments(features, labels) for features, labels in parts)
        for more in others:
            first = BatchMoments(*(left + right for left, right in zip(first, more, strict=True)))
        return self.merge_(first)

    @torch.no_grad()
    def moments(self, features: Tensor, labels: Tensor) -> BatchMoments:
        """Sums, counts and sums of squares of a batch, or of a part of one."""
        num_classes, dim = self.mean.shape
        found = ops.class_moments(
            features, labels, num_classes, squares=True, normalize=self.normalize, ignore_index=self.ignore_index,
            backend=self.backend,
        )  # fmt: skip
        if features.shape[1] != dim:
            raise ValueError(
                f"ProtoEstimator: features must be [B, {dim}, h, w] or [N, {dim}], got shape {list(features.shape)}"
            )
        assert found.squares is not None
        return BatchMoments(found.sums, found.counts, found.squares)

    @torch.no_grad()
    def merge_(self, batch: BatchMoments) -> ProtoEstimator:
        """Merge the moments of a batch, which are added over all ranks first. No host sync."""
        if is_distributed():
            batch = BatchMoments(*summed_over_ranks(*batch))
        sums, counts, squares = (values.to(torch.float64) for values in batch)
        seen = (counts >= self.min_pixels) & sums.isfinite().all(1) & squares.isfinite().all(1)
        counts = counts.where(seen, 0)
        pixels = counts.clamp_min(1)[:, None]
        mean = (sums / pixels).where(seen[:, None], 0)
        variance = (squares / pixels - mean.square()).clamp_min(0).where(seen[:, None], 0)
        weight = (counts / (counts + self.amount).clamp_min(1))[:, None]
        step = mean - self.mean
        merged = self.variance * (1 - weight) + variance * weight + weight * (1 - weight) * step.square()
        move_buffers_(
            self,
            variance=merged.where(seen[:, None], self.variance),
            mean=(self.mean + weight * step).where(seen[:, None], self.mean),
            amount=self.amount + counts,
        )
        return self

    @torch.no_grad()
    def load_(
        self, prototypes: Tensor, variances: Tensor | None = None, amount: Tensor | None = None
    ) -> ProtoEstimator:
        """Take over means [K, D], variances [K, D] (None: 0) and the number of pixels behind them [K].

        amount None: 0, so the first batch that has a class replaces what was taken over.
        """
        for name, given, buffer in (
            ("prototypes", prototypes, self.mean),
            ("variances", variances, self.variance),
            ("amount", amount, self.amount),
        ):
            if given is not None and given.shape != buffer.shape:
                raise ValueError(f"ProtoEstimator: expected {name} {list(buffer.shape)}, got {list(given.shape)}")
            buffer.zero_() if given is None else buffer.copy_(given)
        return self

    def extra_repr(self) -> str:
        return f"num_classes={self.mean.shape[0]}, dim={self.mean.shape[1]}, normalize={self.normalize}"
