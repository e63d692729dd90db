"""PrototypeClusters: several running prototypes per class, between which a class's pixels are shared evenly."""

from __future__ import annotations

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
    labelled_grid,
    own_scores,
    predictions_on,
)
from .float32 import Float32Statistics

_ASSIGNMENTS = ("gumbel", "argmax")


class PrototypeClusters(Float32Statistics):
    """M unit prototypes of each class:  p_km <- normalize(keep p_km + (1 - keep) normalize(sum of the unit features assigned to it)).

    num_classes, dim, per_class  K, D and M of `.prototypes`, a [K, M, D] float32 buffer; drawn from a normal distribution, of unit length.
    keep         share of the OLD prototype (gamma of the authors).
    epsilon, iterations  of Sinkhorn, within the pixels of each class of this process.
    assignment   which row an update counts a pixel to. "gumbel", as the authors' code: a sample of softmax(t) where t are the
                 assignment's PROBABILITIES (their code passes them as logits), so a pixel often counts to a row that is not its
                 likeliest; it draws from torch's generator. "argmax": the likeliest, which draws nothing.
    ignore_index of the labels. Rows say -1 where a pixel has none.

    With torch.distributed initialised each rank moves by its own pixels and the prototypes are averaged over ranks, as the authors do.
    Memory: O(N M) for the assignment. No host sync.
    Source: Zhou et al., Rethinking Semantic Segmentation: A Prototype View, arXiv 2203.15102; `lib/models/nets/hrnet.py` of the code.
    """

    prototypes: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        per_class: int = 10,
        *,
        keep: float = 0.999,
        epsilon: float = 0.05,
        iterations: int = 3,
        assignment: str = "gumbel",
        normalize: bool = True,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if min(num_classes, dim, per_class) < 1:
            raise ValueError(
                f"PrototypeClusters: num_classes, dim and per_class must be at least 1, got {num_classes}, {dim} and {per_class}"
            )
        if not 0 <= keep <= 1:
            raise ValueError(f"PrototypeClusters: keep must be in [0, 1], got {keep}")
        if assignment not in _ASSIGNMENTS:
            raise ValueError(f"PrototypeClusters: assignment must be 'gumbel' or 'argmax', got {assignment!r}")
        if not epsilon > 0 or iterations < 1:
            raise ValueError(
                f"PrototypeClusters: epsilon must be above 0 and iterations at least 1, got {epsilon} and {iterations}"
            )
        self.keep, self.epsilon, self.iterations = keep, epsilon, iterations
        self.assignment, self.normalize, self.ignore_index = assignment, normalize, ignore_index
        self.register_buffer("prototypes", F.normalize(torch.randn(num_classes, per_class, dim), dim=-1))

    @property
    def rows(self) -> Tensor:
        """[K M, D]: row k M + m is prototype m of class k."""
        return self.prototypes.flatten(0, 1)

    def assign(self, features: Tensor, labels: Tensor) -> Tensor:
        """The likeliest row of each pixel, on the features' grid: int64, -1 where it has no label. features and labels as in the ops."""
        given, found = self._assignment(features, labels)
        return found.rows().view(given.grid)

    @torch.no_grad()
    def update_(self, features: Tensor, labels: Tensor, predictions: Tensor | None = None) -> Tensor:
        """Move the prototypes by one batch -> the likeliest rows, as `assign` gives them for the prototypes before the move.

        predictions on the features' grid: only pixels whose label equals the prediction move a prototype; all of them get a row.
        """
        given, found = self._assignment(features, labels)
        likeliest = found.rows()
        moving = likeliest if self.assignment == "argmax" else found.rows(sampled_index(found.probabilities))
        if predictions is not None:
            moving = moving.masked_fill(
                predictions_on("PrototypeClusters", given, predictions).view(found.labels.shape) != found.labels, NONE
            )
        moments = ops.class_moments(given.features, moving, len(self.rows), normalize=self.normalize, ignore_index=NONE)
        self.move_(moments.sums, moments.counts)
        return likeliest.view(given.grid)

    @torch.no_grad()
    def move_(self, sums: Tensor, counts: Tensor) -> PrototypeClusters:
        """By sums [K M, D] and counts [K M] of the features of each row; a row without pixels, or whose sum is not finite, stays."""
        moved = moved_rows(self.rows, sums, counts, self.keep)
        self.prototypes = moved.view(self.prototypes.shape)
        return self

    @torch.no_grad()
    def load_(self, prototypes: Tensor) -> PrototypeClusters:
        """Take over prototypes [K, M, D]; from [K, D] each class's M start around that one, drawn with a fixed seed."""
        self.prototypes.copy_(spread_around("PrototypeClusters", prototypes, self.prototypes.shape))
        return self

    def _assignment(self, features: Tensor, labels: Tensor) -> tuple[LabelledGrid, Assignment]:
        num_classes, per_class, dim = self.prototypes.shape
        given = labelled_grid("PrototypeClusters", features, labels, self.ignore_index)
        if given.features.shape[1] != dim:
            raise ValueError(
                f"PrototypeClusters: features must be [B, {dim}, h, w] or [N, {dim}], got shape {list(features.shape)}"
            )
        scores = own_scores(given, ClassRows(self.rows), per_class, normalize=self.normalize)
        found = balanced_assignment(scores, given.labels, num_classes, epsilon=self.epsilon, iterations=self.iterations)
        return given, found

    def extra_repr(self) -> str:
        num_classes, per_class, dim = self.prototypes.shape
        return f"num_classes={num_classes}, dim={dim}, per_class={per_class}, keep={self.keep}"


def spread_around(name: str, prototypes: Tensor, shape: torch.Size) -> Tensor:
    """Unit prototypes [K, M, D] as they are; from [K, D], M around each one, drawn with a fixed seed."""
    if prototypes.shape == (shape[0], shape[2]):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(prototypes.device)
        around = F.normalize(prototypes.float(), dim=1)[:, None]
        prototypes = around + 0.1 * F.normalize(noise, dim=-1)
    if prototypes.shape != shape:
        raise ValueError(
            f"{name}: expected prototypes {list(shape)} or {[shape[0], shape[2]]}, got {list(prototypes.shape)}"
        )
    return F.normalize(prototypes.float(), dim=-1)


def sampled_index(probabilities: Tensor) -> Tensor:
    """[B, M, h, w] -> [B, h, w]: argmax of probability + Gumbel noise, what F.gumbel_softmax(probabilities, hard=True) picks."""
    noise = -torch.empty_like(probabilities).exponential_().log()
    return (probabilities + noise).argmax(1)


def moved_rows(rows: Tensor, sums: Tensor, counts: Tensor, keep: float) -> Tensor:
    """Rows [R, D] moved by sums [R, D] and counts [R], of unit length; a row without pixels, or whose sum is not finite, stays.

    Each rank moves by its own pixels; then the rows are averaged over ranks.
    """
    is_there = ((counts > 0) & sums.isfinite().all(1))[:, None]
    moved = F.normalize(torch.where(is_there, keep * rows + (1 - keep) * F.normalize(sums, dim=1), rows), dim=1)
    if distributed.world_size() == 1:
        return moved
    distributed.all_reduce_([moved], average=True)
    return F.normalize(moved, dim=1)
