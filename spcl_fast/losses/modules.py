"""nn.Module forms of the losses: the same names and defaults as the functions."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class PrototypeContrastiveLoss(nn.Module):
    """`prototype_contrastive_loss` with its settings fixed. forward(features, labels, prototypes, pixel_weight=None, variances=None)."""

    class_weight: Tensor | None

    def __init__(
        self,
        temperature: float,
        *,
        normalize: bool = True,
        ignore_index: int = 255,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.normalize = normalize
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        prototypes: Tensor,
        pixel_weight: Tensor | None = None,
        variances: Tensor | None = None,
    ) -> Tensor:
        return ops.prototype_contrastive_loss(
            features,
            labels,
            prototypes,
            temperature=self.temperature,
            normalize=self.normalize,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            pixel_weight=pixel_weight,
            variances=variances,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class UpsampledCrossEntropyLoss(nn.Module):
    """`upsampled_cross_entropy` with its settings fixed. forward(logits, labels, pixel_weight=None)."""

    class_weight: Tensor | None

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        align_corners: bool = True,
        ignore_index: int = 255,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.align_corners = align_corners
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
        return ops.upsampled_cross_entropy(
            logits,
            labels,
            temperature=self.temperature,
            align_corners=self.align_corners,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            pixel_weight=pixel_weight,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        settings = (
            f"temperature={self.temperature}, align_corners={self.align_corners}, ignore_index={self.ignore_index}"
        )
        return f"{settings}, reduction={self.reduction!r}"
