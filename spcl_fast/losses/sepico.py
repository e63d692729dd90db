"""SePiCo (Xie et al., TPAMI 2023, arXiv 2204.08808): pixels against class means, class Gaussians, or banks of class means."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..estimators import MeanBank, ProtoEstimator
from ..estimators.moments import BatchMoments
from ..ops import checks, labels_on, prototype_contrastive_loss
from ..ops.dispatched import ignores_autocast
from ..ops.pixels import labels_of, pixel_weight_of, pixels_of
from .bank_contrast import Bank, bank_contrast
from .mean_feature import mean_feature

_OP = "sepico"


def proto_cl(
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], integer
    prototypes: Tensor,  # [K, D], a constant
    *,
    temperature: float = 100.0,
    normalize: bool = True,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,  # [K]
    pixel_weight: Tensor | None = None,  # [B, h, w] or [B, H, W], or [N]
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # [] or, for reduction="none", [B, h, w] or [N]; float32 (float64 for float64 features)
    """ProtoCL:  loss = w_y (logsumexp z - z_y),   z_k = <u, prototype_k> / temperature,   u = x/|x|.

    features [B, D, h, w] or [N, D]; labels [B, H, W] of any size or [N], integer; prototypes [K, D], a constant -> [] or, for
    reduction="none", [B, h, w] or [N].
    `prototype_contrastive_loss`, but the mean divides by the number of labelled pixels whatever their class weights, as the authors' does.
    Raises and allocates as that. `proto_reg` is the regulariser. Source: SePiCo, arXiv 2204.08808, eq. for prototype-level contrast.
    """
    return prototype_contrastive_loss(
        features, labels, prototypes.detach(), temperature=temperature, normalize=normalize, ignore_index=ignore_index,
        class_weight=class_weight, pixel_weight=pixel_weight, reduction=reduction, backend=backend,
        denominator=_labelled(features, labels, ignore_index) if class_weight is not None and reduction == "mean" else "labelled",
    )  # fmt: skip


def dist_cl(
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], integer
    prototypes: Tensor,  # [K, D], a constant
    variances: Tensor,  # [K, D], a constant
    *,
    ratio: float = 1.0,
    temperature: float = 100.0,
    normalize: bool = True,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,  # [K]
    pixel_weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # as proto_cl
    """DistCL: the upper bound of contrast with infinitely many draws from each class's Gaussian.

    features [B, D, h, w] or [N, D]; labels [B, H, W] of any size or [N], integer; prototypes and variances [K, D], constants ->
    [] or, for reduction="none", [B, h, w] or [N].
        v_k = 1/2 ratio <u^2, variance_k> / temperature^2,   z_k = <u, prototype_k> / temperature + v_k,   u = x/|x|
        loss = w_y (logsumexp z - z_y) + v_y

    The class weight multiplies only the softmax part, as in the authors' code; without class weights this is
    `prototype_contrastive_loss(variances=ratio * variances, positive_variance=False)`, one read of the features; with them it is two.
    The mean divides by the number of labelled pixels. Raises and allocates as that. Source: SePiCo, arXiv 2204.08808.
    """
    counted = (
        _labelled(features, labels, ignore_index) if class_weight is not None and reduction == "mean" else "labelled"
    )
    wide = checks.wide(features)
    settings: dict[str, Any] = {
        "temperature": temperature, "normalize": normalize, "ignore_index": ignore_index, "pixel_weight": pixel_weight,
        "variances": ratio * variances.detach().to(wide), "reduction": reduction, "backend": backend, "denominator": counted,
    }  # fmt: skip
    bound = prototype_contrastive_loss(features, labels, prototypes.detach(), positive_variance=False, **settings)
    if class_weight is None:
        return bound
    excess = class_weight.to(wide) - 1  # w (lse - z) + v = (lse - z + v) + (w - 1) (lse - z)
    return bound + prototype_contrastive_loss(features, labels, prototypes.detach(), class_weight=excess, **settings)


def bank_cl(
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], integer
    rows: Tensor,  # [K, M, D], constants
    is_there: Tensor | None = None,  # [K, M] bool; None: all
    *,
    temperature: float = 100.0,
    normalize: bool = True,
    ignore_index: int = 255,
    pixel_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # as proto_cl
    """BankCL: each of the M rows of the pixel's class against the mean row of every other class.

    features [B, D, h, w] or [N, D]; labels [B, H, W] of any size or [N], integer; rows [K, M, D] and is_there [K, M] bool, constants ->
    [] or, for reduction="none", [B, h, w] or [N].
        loss = mean over m of  -log( e^{s_ym} / (e^{s_ym} + sum over c != y of e^{mean of s_c}) ),   s_cm = <u, row_cm> / temperature

    rows        as `MeanBank.rows`, with `MeanBank.is_there()`. Classes without a row take no part, and their pixels count as ignored.
    The mean divides by the number of labelled pixels. Differentiable once, in `features`. Plain PyTorch in tiles of one class.
    Raises ValueError or TypeError for what does not fit. A label outside [0, K) counts as ignored.
    Memory: the gradient, and 4 MB of similarities at a time, forward and backward; the authors' code keeps N x K x M.
    Source: SePiCo, arXiv 2204.08808.
    """
    pixels = pixels_of("bank_cl", features)
    checks.check_float("bank_cl", "rows", rows, (3,), "[K, M, D]")
    checks.check_temperature("bank_cl", temperature)
    checks.check_reduction("bank_cl", reduction)
    if rows.shape[2] != pixels.features.shape[1]:
        raise ValueError(
            f"bank_cl: rows must be [K, M, D] with the features' D, got {list(rows.shape)} for features {list(features.shape)}"
        )
    is_there = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device) if is_there is None else is_there
    if is_there.dtype != torch.bool or is_there.shape != rows.shape[:2]:
        raise ValueError(
            f"bank_cl: is_there must be bool {list(rows.shape[:2])}, got {is_there.dtype} {list(is_there.shape)}"
        )
    checks.check_device("bank_cl", pixels.features, "features", rows=rows, is_there=is_there)
    grid = labels_on(labels_of("bank_cl", pixels, labels), pixels.features.shape[2:])
    loss = bank_contrast(
        pixels.features, grid, Bank(rows, is_there), temperature, normalize=normalize, ignore_index=ignore_index
    )
    weight = pixel_weight_of("bank_cl", pixels, labels, pixel_weight)
    loss = loss if weight is None else loss * weight
    if reduction == "none":
        return pixels.map(loss)
    return loss.sum() / (grid != ignore_index).sum().clamp_min(1) if reduction == "mean" else loss.sum()


@ignores_autocast
def proto_reg(
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], integer: which pixels count
    prototypes: Tensor,  # [K, D], a constant
    *,
    temperature: float = 100.0,
    normalize: bool = True,
    ignore_index: int = 255,
) -> Tensor:  # []
    """loss = sum over k of log softmax(z)_k / (K ln K),   z_k = <m, prototype_k> / temperature,   m the mean unit feature.

    features [B, D, h, w] or [N, D]; labels [B, H, W] of any size or [N], integer: which pixels count; prototypes [K, D], a constant -> [].
    The sign is the authors'; z is that of the mean feature, one row, so it costs a read of the features. 0 for one class.
    Nothing labelled: 0. Raises and allocates as `mean_feature`. Source: SePiCo, arXiv 2204.08808, L_reg.
    """
    mean = mean_feature(features, labels, normalize=normalize, ignore_index=ignore_index)
    scores = prototypes.detach().to(mean.dtype) @ mean / temperature
    counts = _labelled(features, labels, ignore_index, least=0) > 0
    return scores.log_softmax(0).sum().where(counts, 0) / reg_norm(len(prototypes))


def reg_norm(num_classes: int) -> float:
    """K ln K: what `proto_reg` divides by; 1 for one class."""
    return num_classes * math.log(num_classes) if num_classes > 1 else 1.0


def _labelled(features: Tensor, labels: Tensor, ignore_index: int, least: int = 1) -> Tensor:
    """How many pixels of the features' grid have a label, at least `least`, [] without a host sync."""
    pixels = pixels_of(_OP, features)
    grid = labels_on(labels_of(_OP, pixels, labels), pixels.features.shape[2:])
    return (grid != ignore_index).sum().clamp_min(least).to(checks.wide(features))


# ---- objectives of the stage `adapt` -----------------------------------------------------------------------------------


class ProtoCL(ProtoEstimator):
    """Cumulative class means, ProtoCL against them, and `reg_weight` times `proto_reg`."""

    def __init__(
        self, num_classes: int, dim: int, *, temperature: float, reg_weight: float = 0.0, ratio: float = 1.0, **statistics: Any
    ) -> None:  # fmt: skip
        super().__init__(num_classes, dim, **statistics)
        self.temperature = temperature
        self.reg_weight = reg_weight
        self.ratio = ratio

    def settings(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "normalize": self.normalize, "ignore_index": self.ignore_index}

    @property
    def chance(self) -> float:
        return math.log(len(self.prototypes))

    def contrast(self, features: Tensor, labels: Tensor) -> Tensor:
        return proto_cl(features, labels, self.prototypes, backend=self.backend, **self.settings())

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        loss = self.contrast(features, labels)
        if self.reg_weight:
            loss = loss + self.reg_weight * proto_reg(features, labels, self.prototypes, **self.settings())
        return loss


class DistCL(ProtoCL):
    """Cumulative class means and variances, and DistCL against them."""

    def contrast(self, features: Tensor, labels: Tensor) -> Tensor:
        return dist_cl(
            features, labels, self.prototypes, self.variances, ratio=self.ratio, backend=self.backend, **self.settings()
        )


class BankCL(ProtoCL):
    """Banks of batch means, and BankCL against them; the cumulative means are those of `proto_reg`."""

    def __init__(self, num_classes: int, dim: int, *, length: int = 100, **settings: Any) -> None:
        super().__init__(num_classes, dim, **settings)
        self.bank = MeanBank(num_classes, dim, length, min_pixels=self.min_pixels)

    def merge_(self, batch: BatchMoments) -> BankCL:
        super().merge_(batch)
        self.bank.append_(batch.sums, batch.counts)
        return self

    def load_(self, prototypes: Tensor, variances: Tensor | None = None, amount: Tensor | None = None) -> BankCL:
        super().load_(prototypes, variances, amount)
        self.bank.load_(prototypes)
        return self

    def contrast(self, features: Tensor, labels: Tensor) -> Tensor:
        return bank_cl(features, labels, self.bank.rows, self.bank.is_there(), **self.settings())


def _statistics(settings: Any) -> dict[str, Any]:
    """What every objective here takes of the stage's settings."""
    return {
        "temperature": settings.contrast_temperature,
        "reg_weight": settings.contrast_regularizer,
        "min_pixels": settings.min_pixels,
        "normalize": settings.normalize,
    }


def proto_objective(num_classes: int, dim: int, settings: Any) -> ProtoCL:
    """settings: those of the stage `adapt`."""
    return ProtoCL(num_classes, dim, **_statistics(settings))


def dist_objective(num_classes: int, dim: int, settings: Any) -> DistCL:
    """settings: those of the stage `adapt`."""
    return DistCL(num_classes, dim, ratio=settings.variance_ratio, **_statistics(settings))


def bank_objective(num_classes: int, dim: int, settings: Any) -> BankCL:
    """settings: those of the stage `adapt`."""
    return BankCL(num_classes, dim, length=settings.bank_length, **_statistics(settings))
