"""SPCL (arXiv 2111.12358): pixels of both domains against class prototypes, which follow the source."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..estimators.bank import PrototypeBank
from ..ops import prototype_contrastive_loss


class SPCLObjective(PrototypeBank):
    """A bank of moving prototypes, and the loss against it."""

    def __init__(self, num_classes: int, dim: int, *, temperature: float, **bank: Any) -> None:
        super().__init__(num_classes, dim, **bank)
        self.temperature = temperature

    @property
    def chance(self) -> float:
        return math.log(len(self.prototypes))

    @torch.no_grad()
    def update_in_parts_(self, parts: Iterable[tuple[Tensor, Tensor]]) -> SPCLObjective:
        (sums, counts), *others = (self.moments(features, labels) for features, labels in parts)
        for more_sums, more_counts in others:
            sums, counts = sums + more_sums, counts + more_counts
        self.move_(sums, counts)
        return self

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return prototype_contrastive_loss(
            features, labels, self.prototypes, temperature=self.temperature, normalize=self.normalize
        )


def objective(num_classes: int, dim: int, settings: Any) -> SPCLObjective:
    """settings: those of the stage `adapt`."""
    return SPCLObjective(
        num_classes,
        dim,
        temperature=settings.contrast_temperature,
        keep=settings.keep,
        absent=settings.absent,
        min_pixels=settings.min_pixels,
        normalize=settings.normalize,
    )
