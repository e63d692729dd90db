"""ClassMemory: the last features of each class, in a ring per class."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import checks
from .assignment import NONE, labelled_grid
from .float32 import Float32Statistics
from .ring import enqueue_, over_ranks


class ClassMemory(Float32Statistics):
    """num_classes, dim, size: `.queue` [K, size, D] float32, unit features; `.written` [K] int64, how many each class ever got.

    max_samples  pixels of a batch that enter per class, evenly spaced in the order of pixels (10); those that are not finite never do.
    The queue is moved in place: update after the backward of a loss that was recorded against it, or before that loss.
    With torch.distributed initialised the pixels of all ranks enter; each must have as many. No host sync.
    Memory: 4 K size D bytes. Source: the pixel queue of Wang et al., arXiv 2101.11939; theirs draws at random, see compat.contrastiveseg.
    """

    queue: Tensor
    queue_next: Tensor
    written: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        size: int,
        *,
        max_samples: int = 10,
        normalize: bool = True,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if min(num_classes, dim, size, max_samples) < 1:
            raise ValueError(
                "ClassMemory: num_classes, dim, size and max_samples must be at least 1, got "
                f"{num_classes}, {dim}, {size} and {max_samples}"
            )
        self.max_samples, self.normalize, self.ignore_index = max_samples, normalize, ignore_index
        self.register_buffer("queue", torch.zeros(num_classes, size, dim))
        self.register_buffer("queue_next", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("written", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def update_(self, features: Tensor, labels: Tensor) -> ClassMemory:
        """features and labels as in the ops."""
        given = labelled_grid("ClassMemory", features, labels, self.ignore_index)
        if given.features.shape[1] != self.queue.shape[2]:
            raise ValueError(
                f"ClassMemory: features must have {self.queue.shape[2]} channels, got shape {list(features.shape)}"
            )
        is_finite = given.features.sum(1, dtype=checks.wide(given.features)).isfinite()  # one more pass, nothing kept
        own = over_ranks(given.labels.masked_fill(~is_finite, NONE))
        pixels = over_ranks(given.features)
        taken = enqueue_(self.queue, self.queue_next, pixels, own, self.max_samples, normalize=self.normalize)
        self.written = self.written + taken
        return self

    @property
    def rows(self) -> Tensor:
        """[K size, D], the classes one after the other."""
        return self.queue.flatten(0, 1)

    @property
    def row_labels(self) -> Tensor:
        """[K size]: the class of each row, -1 where nothing was written yet."""
        number, size = self.queue.shape[:2]
        slot = torch.arange(size, device=self.queue.device)
        classes = torch.arange(number, device=self.queue.device)[:, None].expand(number, size)
        return classes.masked_fill(slot >= self.written[:, None], NONE).flatten()

    @property
    def means(self) -> Tensor:
        """[K, D]: of what is there; 0 for a class without any."""
        return self.queue.sum(1) / self.written.clamp(1, self.queue.shape[1])[:, None]
