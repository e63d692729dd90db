"""TeacherCentre: the running mean of a teacher's logits, from its features alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import distributed
from .float32 import Float32Statistics

_BLOCK = 1 << 17  # values of the prototypes that are there in float64 at a time: 1 MB


class TeacherCentre(Float32Statistics):
    """centre_k <- keep centre_k + (1 - keep) mean over pixels of <f_n, prototype_k>, which is <mean f_n, prototype_k>.

    num_prototypes  K of `.centre`, a [K] float32 buffer that starts at 0.
    keep            share of the OLD centre (0.9). A mean that is not finite (an overflow in float16) leaves the centre as it is.
    With torch.distributed initialised the mean is over the pixels of all ranks. Memory: O(K + D); the [N, K] logits are never there.
    Source: Caron et al., DINO, arXiv 2104.14294; `DINOLoss.update_center` of the authors' code.
    """

    centre: Tensor

    def __init__(self, num_prototypes: int, *, keep: float = 0.9) -> None:
        super().__init__()
        if num_prototypes < 1:
            raise ValueError(f"TeacherCentre: num_prototypes must be at least 1, got {num_prototypes}")
        if not 0 <= keep <= 1:
            raise ValueError(f"TeacherCentre: keep must be in [0, 1], got {keep}")
        self.keep = keep
        self.register_buffer("centre", torch.zeros(num_prototypes))

    @torch.no_grad()
    def update_(self, features: Tensor, prototypes: Tensor) -> TeacherCentre:
        """features [N, E] or [..., E] as they meet the prototypes [K, E]. No host sync."""
        if features.shape[-1] != prototypes.shape[1] or len(prototypes) != len(self.centre):
            raise ValueError(
                f"TeacherCentre: features must be [..., E] and prototypes [{len(self.centre)}, E], got {list(features.shape)} and "
                f"{list(prototypes.shape)}"
            )
        rows = features.reshape(-1, features.shape[-1])
        packed = torch.cat([rows.sum(0, dtype=torch.float64), rows.new_tensor([len(rows)], dtype=torch.float64)])
        distributed.all_reduce_([packed])
        mean = packed[:-1] / packed[-1].clamp_min(1)
        logits = _products(prototypes, mean).to(self.centre.dtype)
        is_there = (packed[-1] > 0) & logits.isfinite()
        self.centre = torch.where(is_there, self.keep * self.centre + (1 - self.keep) * logits, self.centre)
        return self

    def potentials(self, temperature: float) -> Tensor:
        """v [K] of `TeacherTargets`: what subtracting the centre from the logits is."""
        return -self.centre / temperature


def _products(prototypes: Tensor, mean: Tensor) -> Tensor:
    """prototypes @ mean in float64, in parts: of 65 536 prototypes the copy in float64 would be twice their gradient."""
    several = max(1, _BLOCK // len(mean))
    found = mean.new_empty(len(prototypes))
    part = mean.new_empty(
        (min(several, len(prototypes)), len(mean))
    )  # one for all: a new one for each may not fit where the last was
    for first in range(0, len(prototypes), several):
        own = prototypes[first : first + several]
        found[first : first + len(own)] = part[: len(own)].copy_(own) @ mean
    return found
