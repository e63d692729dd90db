"""What a loss of the catalog is to training: a module whose state is saved, moved by source pixels, asked for the loss of any."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """An nn.Module. features [B, D, h, w]; labels [B, H, W], integer, any size, 255 ignored."""

    prototypes: Tensor  # [K, D] float32, a buffer

    @property
    def chance(self) -> float:
        """The loss of features that say nothing of their class: what is logged is what is above it. 0: it has no such level."""
        ...

    def update_(self, features: Tensor, labels: Tensor) -> Objective:
        """Move the state by a batch. No gradient, no host sync."""
        ...

    def update_in_parts_(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Objective:
        """The same by a batch that comes in parts (features, labels); one part is alive at a time."""
        ...

    def load_(self, prototypes: Tensor) -> Objective:
        """Start from prototypes [K, D]."""
        ...

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss, a mean over the labelled pixels; 0 where there are none."""
        ...
