"""MeanBank: the last batch means of each class, the memory of SePiCo's BankCL."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .moving import ExactBuffers, is_distributed, move_buffers_, summed_over_ranks


class MeanBank(ExactBuffers):
    """A ring of `length` rows for each class; an update appends the mean feature of every class that the batch holds.

    rows    [K, M, D] float32 buffer; filled [K] int64: how many rows of each class were ever appended, so min(filled, M) are there.
    length  M. The oldest row gives way.

    With torch.distributed initialised the means are those of all ranks. Each update makes new buffers. No host sync.
    Source: SePiCo, arXiv 2204.08808; its code appends to a deque of tensors per class.
    """

    rows: Tensor
    filled: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        length: int = 100,
        *,
        min_pixels: int = 1,
        normalize: bool = True,
        ignore_index: int = 255,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if min(num_classes, dim, length, min_pixels) < 1:
            raise ValueError(
                "MeanBank: num_classes, dim, length and min_pixels must be at least 1, got "
                f"{num_classes}, {dim}, {length} and {min_pixels}"
            )
        self.min_pixels = min_pixels
        self.normalize = normalize
        self.ignore_index = ignore_index
        self.backend = backend
        self.register_buffer("rows", torch.zeros(num_classes, length, dim))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.int64))

    def is_there(self) -> Tensor:
        """[K, M] bool: the rows that were appended."""
        return torch.arange(self.rows.shape[1], device=self.rows.device) < self.filled[:, None]

    def of_class(self, index: int) -> Tensor:
        """[at most M, D]: the rows of a class, oldest first. Waits for the GPU; for looking at."""
        length, filled = self.rows.shape[1], int(self.filled[index])
        rows = self.rows[index, : min(filled, length)]
        return rows if filled <= length else rows.roll(-(filled % length), 0)

    @torch.no_grad()
    def update_(self, features: Tensor, labels: Tensor) -> MeanBank:
        """Append the means of a batch. features [B, D, h, w] or [N, D]; labels [B, H, W] or [N], integer, any size."""
        found = ops.class_moments(
            features, labels, len(self.rows), normalize=self.normalize, ignore_index=self.ignore_index, backend=self.backend
        )  # fmt: skip
        return self.append_(found.sums, found.counts)

    @torch.no_grad()
    def append_(self, sums: Tensor, counts: Tensor) -> MeanBank:
        """Append the means of a batch's sums [K, D] and counts [K], which are added over all ranks first. No host sync."""
        if is_distributed():
            sums, counts = summed_over_ranks(sums, counts)
        seen = (counts >= self.min_pixels) & sums.isfinite().all(1)
        means = sums / counts.clamp_min(1)[:, None]
        at = self.filled % self.rows.shape[1]
        here = (torch.arange(self.rows.shape[1], device=at.device) == at[:, None]) & seen[:, None]
        rows = torch.where(here[..., None], means[:, None].to(self.rows.dtype), self.rows)
        move_buffers_(self, rows=rows, filled=self.filled + seen)
        return self

    @torch.no_grad()
    def load_(self, prototypes: Tensor) -> MeanBank:
        """Start from one row per class, prototypes [K, D]."""
        if prototypes.shape != self.rows[:, 0].shape:
            raise ValueError(
                f"MeanBank: expected prototypes {list(self.rows[:, 0].shape)}, got {list(prototypes.shape)}"
            )
        self.rows.zero_()[:, 0].copy_(prototypes)
        self.filled.fill_(1)
        return self

    def extra_repr(self) -> str:
        return "num_classes={}, length={}, dim={}".format(*self.rows.shape)
