"""TeacherTargets: soft targets that a teacher's features and prototypes give, computed where they are used and never stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import Teacher
from . import checks

_NAME = "TeacherTargets"


class TeacherTargets(NamedTuple):
    """Soft labels of `prototype_contrastive_loss`:  t_nk = exp(<f_n, prototype_k> / temperature + u_n + v_k).

    features     of the teacher, on the grid of the student's: [B, E, h, w] or [N, E], used as they are; constants.
    prototypes   of the teacher, [K, E], used as they are: row k is the student's class k.
    temperature  of the teacher.
    u, v         potentials as `balance_` returns them (SwAV, DINOv2, CAPI). v None: 0; v = -centre / temperature is DINO's centring.
                 u None: each row's probabilities sum to 1 (a softmax).

    Memory: neither [N, K] tensor is ever there; O(N D). Source: Caron et al., arXiv 2006.09882 and 2104.14294.
    """

    features: Tensor
    prototypes: Tensor
    temperature: float
    u: Tensor | None = None  # [N], or the features' grid [B, h, w]
    v: Tensor | None = None  # [K]

    def resolved(self, backend: str | None = None) -> Teacher:
        """With both potentials, checked. backend: that of the loss, so that its scores are those that u was made of."""
        features, prototypes, temperature, u, v = self
        checks.check_float(_NAME, "features", features, tuple(range(2, 10)), "[B, E, h, w] or [N, E]")
        checks.check_float(_NAME, "prototypes", prototypes, (2,), "[K, E]")
        if prototypes.shape[1] != features.shape[1]:
            raise ValueError(
                f"{_NAME}: prototypes must be [K, E] with the features' E, got {list(prototypes.shape)} for features {list(features.shape)}"
            )
        checks.check_temperature(_NAME, temperature)
        if features.requires_grad or prototypes.requires_grad:
            raise ValueError(
                f"{_NAME}: targets are constants of the loss; pass features.detach() and prototypes.detach()"
            )
        wide = checks.wide(features)
        pixels = features.numel() // features.shape[1]
        v = prototypes.new_zeros(len(prototypes), dtype=wide) if v is None else v.to(wide)
        if v.shape != prototypes.shape[:1]:
            raise ValueError(f"{_NAME}: v must be [K] = {[len(prototypes)]}, got shape {list(v.shape)}")
        if u is None:
            from .balance import row_potentials

            u = row_potentials(rows_of(features), prototypes, temperature, v, backend)
        if u.numel() != pixels:
            raise ValueError(f"{_NAME}: u must have one value for each of {pixels} pixels, got shape {list(u.shape)}")
        checks.check_device(_NAME, features, "features", prototypes=prototypes, u=u, v=v)
        return Teacher(features, prototypes, float(temperature), u.to(torch.float64), v)


def rows_of(features: Tensor) -> Tensor:
    """[B, E, ...] -> [N, E]."""
    return features if features.dim() == 2 else features.movedim(1, -1).flatten(0, -2)
