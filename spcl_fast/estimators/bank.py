"""PrototypeBank: the running class prototypes, the only state that the contrastive loss has."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import checks
from ..ops.pixels import Pixels, labels_of, map_of, pixels_of
from .moving import ExactBuffers, is_distributed, is_in_place, move_buffers_, summed_over_ranks

_ABSENT = ("keep", "decay")


class PrototypeBank(ExactBuffers):
    """Running mean feature of each class: prototype_k <- keep * prototype_k + (1 - keep) * (mean unit feature of class k in the batch).

    num_classes, dim  K and D of `.prototypes`, a [K, D] float32 buffer that starts at 0; fill it with `load_` or a first pass.
    keep              share of the OLD prototype in an update (the released code calls it ALPHA: 0.1).
    absent            a class that the batch does not hold: "keep" its prototype, or "decay" it to `keep` times itself as the release does.
    min_pixels        a class with fewer pixels in the batch counts as absent.
    normalize         average unit features (as SPCL) or the features themselves.

    With torch.distributed initialised, the batch's sums and counts are added over all ranks first, in one all-reduce, so every rank holds
    the same bits. In one process the cuda backend moves the prototypes in the kernel that ends the class sums: one read of the features.
    Each move makes a new `.prototypes`, so a loss recorded before it keeps the ones that it has seen; in an exported program and in a
    captured CUDA graph the buffer is moved in place (capture `update_` together with the loss that reads it). It stays float32 under
    `.half()` and the like. A class whose sum is not finite (an overflow in float16) keeps its prototype.
    Source: arXiv 2111.12358; `train_ours.py` of the released code.
    """

    prototypes: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        keep: float = 0.1,
        absent: str = "keep",
        min_pixels: int = 1,
        normalize: bool = True,
        ignore_index: int = 255,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1 or dim < 1:
            raise ValueError(f"PrototypeBank: num_classes and dim must be at least 1, got {num_classes} and {dim}")
        if not 0 <= keep <= 1:
            raise ValueError(f"PrototypeBank: keep must be in [0, 1], got {keep}")
        if absent not in _ABSENT:
            raise ValueError(f"PrototypeBank: absent must be 'keep' or 'decay', got {absent!r}")
        if min_pixels < 1:
            raise ValueError(f"PrototypeBank: min_pixels must be at least 1, got {min_pixels}")
        self.keep = keep
        self.absent = absent
        self.min_pixels = min_pixels
        self.normalize = normalize
        self.ignore_index = ignore_index
        self.backend = backend
        self.register_buffer("prototypes", torch.zeros(num_classes, dim))

    @torch.no_grad()
    def update_(self, features: Tensor, labels: Tensor, predictions: Tensor | None = None) -> PrototypeBank:
        """Move the prototypes by one batch.

        features [B, D, h, w], [N, D], [B, D, L] or [B, D, T, h, w]; labels [B, H, W] or [N], integer or bool, any size; predictions
        [B, h, w] or [N] (argmax of the classifier, on the features' grid): only pixels whose label equals the prediction count. No host
        sync.
        """
        pixels = pixels_of("PrototypeBank", features)
        labels = labels_of("PrototypeBank", pixels, labels)
        if features.shape[1] != self.prototypes.shape[1]:
            raise ValueError(
                f"PrototypeBank: features must be [B, {self.prototypes.shape[1]}, h, w] or [N, {self.prototypes.shape[1]}], "
                f"got shape {list(features.shape)}"
            )
        if predictions is not None:
            labels = self._agreement(pixels, labels, predictions)
        if is_distributed():
            return self.move_(*self.moments(pixels.features, labels))
        moved = self.prototypes if is_in_place() else self.prototypes.clone()
        ops.move_prototypes_(moved, pixels.features, labels, **self._average(), **self._settings())
        self.prototypes = moved
        return self

    @torch.no_grad()
    def moments(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums [K, D] and counts [K] of a batch, or of a part of one: parts add up."""
        moments = ops.class_moments(features, labels, self.prototypes.shape[0], **self._settings())
        return moments.sums, moments.counts

    @torch.no_grad()
    def move_(self, sums: Tensor, counts: Tensor) -> PrototypeBank:
        """Move the prototypes by a batch's sums and counts, which are added over all ranks first. No host sync."""
        if is_distributed():
            sums, counts = summed_over_ranks(sums, counts)
        move_buffers_(self, prototypes=ops.moved_prototypes(self.prototypes, sums, counts, **self._average()))
        return self

    def load_(self, prototypes: Tensor) -> PrototypeBank:
        """Take over prototypes [K, D]."""
        if prototypes.shape != self.prototypes.shape:
            raise ValueError(
                f"PrototypeBank: expected prototypes {list(self.prototypes.shape)}, got {list(prototypes.shape)}"
            )
        self.prototypes.copy_(prototypes)
        return self

    def _settings(self) -> dict:
        return {"normalize": self.normalize, "ignore_index": self.ignore_index, "backend": self.backend}

    def _average(self) -> dict:
        return {"keep": self.keep, "min_pixels": self.min_pixels, "decay_absent": self.absent == "decay"}

    def _agreement(self, pixels: Pixels, labels: Tensor, predictions: Tensor) -> Tensor:
        layout = "[N]" if len(pixels.grid) == 1 else "[B, h, w]"
        checks.check_labels_tensor("PrototypeBank", predictions, len(pixels.grid), layout, "predictions")
        if tuple(predictions.shape) != pixels.grid:
            raise ValueError(
                f"PrototypeBank: predictions must have the features' grid {list(pixels.grid)}, got shape {list(predictions.shape)}"
            )
        return ops.agreement_labels(
            labels, map_of(pixels, predictions), num_classes=len(self.prototypes), ignore_index=self.ignore_index
        )

    def extra_repr(self) -> str:
        return f"num_classes={self.prototypes.shape[0]}, dim={self.prototypes.shape[1]}, keep={self.keep}, absent={self.absent!r}"
