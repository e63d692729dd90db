"""SDCA (Li et al., arXiv 2105.05013) and ProCA (Jiang et al., arXiv 2207.06654): contrast with the statistics of the raw features."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..estimators import ProtoEstimator
from ..ops import prototype_contrastive_loss


def sdca_loss(
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], integer
    mean: Tensor,  # [K, D], a constant
    variance: Tensor,  # [K, D], a constant
    *,
    temperature: float = 1.0,
    ignore_index: int = 255,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # [] or, for reduction="none", [B, h, w] or [N]; float32 (float64 for float64 features)
    """Semantic-distribution contrast: every row of mean and variance is made unit length, then

        v_k = 1/2 <u^2, variance_k/|variance_k|> / temperature^2,   z_k = <u, mean_k/|mean_k|> / temperature + v_k,   u = x/|x|
        loss = logsumexp z - z_y + v_y

    features [B, D, h, w] or [N, D]; labels [B, H, W] of any size or [N], integer; mean and variance [K, D], constants -> [] or, for
    reduction="none", [B, h, w] or [N].
    `prototype_contrastive_loss(variances=..., positive_variance=False)`; raises and allocates as that.
    Source: SDCA, arXiv 2105.05013; that the variance has unit length, too, is in the released code (core/utils/loss.py).
    """
    return prototype_contrastive_loss(
        features, labels, F.normalize(mean.detach(), dim=1), variances=F.normalize(variance.detach(), dim=1), temperature=temperature,
        positive_variance=False, ignore_index=ignore_index, reduction=reduction, backend=backend,
    )  # fmt: skip


def proca_loss(
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], integer
    prototypes: Tensor,  # [K, D], a constant
    *,
    temperature: float = 1.0,
    ignore_index: int = 255,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # as sdca_loss
    """Prototype contrast:  loss = -log softmax(z)_y,   z_k = cos(x, prototype_k) / temperature.

    features [B, D, h, w] or [N, D]; labels [B, H, W] of any size or [N], integer; prototypes [K, D], a constant -> [] or, for
    reduction="none", [B, h, w] or [N].
    `prototype_contrastive_loss` with prototypes of unit length; raises and allocates as that. Source: ProCA, arXiv 2207.06654.
    """
    return prototype_contrastive_loss(
        features, labels, F.normalize(prototypes.detach(), dim=1), temperature=temperature, ignore_index=ignore_index,
        reduction=reduction, backend=backend,
    )  # fmt: skip


# ---- objectives of the stage `adapt` -----------------------------------------------------------------------------------


class ProCA(ProtoEstimator):
    """Cumulative means of the raw features, and ProCA's loss against them."""

    def __init__(self, num_classes: int, dim: int, *, temperature: float, **statistics: Any) -> None:
        super().__init__(num_classes, dim, normalize=False, **statistics)
        self.temperature = temperature

    @property
    def chance(self) -> float:
        return math.log(len(self.prototypes))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return proca_loss(
            features, labels, self.prototypes, temperature=self.temperature, ignore_index=self.ignore_index, backend=self.backend
        )  # fmt: skip


class SDCA(ProCA):
    """Cumulative means and variances of the raw features, and SDCA's loss against them."""

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return sdca_loss(
            features, labels, self.prototypes, self.variances, temperature=self.temperature, ignore_index=self.ignore_index,
            backend=self.backend,
        )  # fmt: skip


def proca_objective(num_classes: int, dim: int, settings: Any) -> ProCA:
    """settings: those of the stage `adapt`. Statistics are those of the raw features, whatever `normalize` says."""
    return ProCA(num_classes, dim, temperature=settings.contrast_temperature, min_pixels=settings.min_pixels)


def sdca_objective(num_classes: int, dim: int, settings: Any) -> SDCA:
    """settings: those of the stage `adapt`. Statistics are those of the raw features, whatever `normalize` says."""
    return SDCA(num_classes, dim, temperature=settings.contrast_temperature, min_pixels=settings.min_pixels)
