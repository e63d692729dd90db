"""Pixel contrast with a memory (Wang et al., ContrastiveSeg, arXiv 2101.11939) as an objective of the adaptation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..estimators.class_memory import ClassMemory
from ..estimators.ring import sampled_pixels
from ..ops import labels_on
from .info_nce import masked_info_nce


class ContrastiveSegObjective(nn.Module):
    """masked_info_nce of up to `anchors` pixels per class and domain against a memory of source pixels.

    Anchors and what enters the memory are evenly spaced in the order of pixels; nothing is drawn. The memory starts empty: as long as no
    class of the batch is in it, the loss is 0. A batch in parts enters part by part, each with pixels of its own. Memory: 4 K size D bytes.
    """

    def __init__(self, memory: ClassMemory, temperature: float, *, anchors: int = 50) -> None:
        super().__init__()
        self.memory, self.temperature, self.anchors = memory, temperature, anchors

    @property
    def prototypes(self) -> Tensor:
        """[K, D]: the mean of each class's memory."""
        return self.memory.means

    @property
    def chance(self) -> float:
        """None: how many pixels an anchor is compared with depends on the memory."""
        return 0.0

    def update_(self, features: Tensor, labels: Tensor) -> ContrastiveSegObjective:
        self.memory.update_(features, labels)
        return self

    def update_in_parts_(self, parts: Iterable[tuple[Tensor, Tensor]]) -> ContrastiveSegObjective:
        for features, labels in parts:
            self.update_(features, labels)
        return self

    def load_(self, prototypes: Tensor) -> ContrastiveSegObjective:
        """A class's prototype is the first row of its memory."""
        memory = self.memory
        if prototypes.shape != (len(memory.queue), memory.queue.shape[2]):
            raise ValueError(
                f"ContrastiveSegObjective: expected prototypes {[len(memory.queue), memory.queue.shape[2]]}, got {list(prototypes.shape)}"
            )
        memory.queue[:, 0] = F.normalize(prototypes.float(), dim=1)
        memory.written.clamp_(min=1)
        memory.queue_next.clamp_(min=1 % memory.queue.shape[1])
        return self

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        memory = self.memory
        own = labels_on(labels, features.shape[2:]).long()
        own = own.masked_fill(own == memory.ignore_index, -1)
        picked = sampled_pixels(features, own, len(memory.queue), self.anchors)
        anchors = picked.values.flatten(0, 1)
        anchors = F.normalize(anchors, dim=1) if memory.normalize else anchors
        return masked_info_nce(
            anchors, picked.labels.flatten(), memory.rows, memory.row_labels, temperature=self.temperature
        )


def objective(num_classes: int, dim: int, settings: Any) -> ContrastiveSegObjective:
    """settings: those of the stage `adapt`. 1000 pixels of each class are remembered."""
    memory = ClassMemory(num_classes, dim, 1000, normalize=settings.normalize)
    return ContrastiveSegObjective(memory, settings.contrast_temperature)
