"""nn.Module forms of the losses: the same names and defaults as the functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops


class _Loss(nn.Module):
    """A loss whose settings are fixed; tensors among them are buffers, a parameter among them is learned."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = tuple(settings)
        for name, value in settings.items():
            is_constant = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
            if is_constant or name in ("class_weight", "prototype_class"):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._settings}

    def extra_repr(self) -> str:
        shown = {name: value for name, value in self.settings().items() if value is not None and name != "backend"}
        return ", ".join(f"{name}={list(v.shape) if isinstance(v, Tensor) else repr(v)}" for name, v in shown.items())


class PrototypeContrastiveLoss(_Loss):
    """`prototype_contrastive_loss` with its settings fixed. forward(features, labels, prototypes, pixel_weight, variances, bias).

    Shapes, memory, errors and source are those of the function.
    temperature may be an nn.Parameter of shape [], which is learned then.
    """

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        normalize: bool = True,
        ignore_index: int = 255,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        backend: str | None = None,
        label_smoothing: float = 0.0,
        prototype_class: Tensor | None = None,
        pool: str = "logsumexp",
        num_classes: int | None = None,
        margin: float = 0.0,
        positive_variance: bool = True,
        denominator: str = "labelled",
        loss: str = "softmax",
    ) -> None:
        super().__init__(
            temperature=temperature, normalize=normalize, ignore_index=ignore_index, class_weight=class_weight, reduction=reduction,
            backend=backend, label_smoothing=label_smoothing, prototype_class=prototype_class, pool=pool, num_classes=num_classes,
            margin=margin, positive_variance=positive_variance, denominator=denominator, loss=loss,
        )  # fmt: skip

    def forward(
        self,
        features: Tensor,
        labels: Tensor | ops.TeacherTargets,
        prototypes: Tensor,
        pixel_weight: Tensor | None = None,
        variances: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        given = {"pixel_weight": pixel_weight, "variances": variances, "bias": bias}
        return ops.prototype_contrastive_loss(features, labels, prototypes, **given, **self.settings())


class UpsampledCrossEntropyLoss(_Loss):
    """`upsampled_cross_entropy` with its settings fixed. forward(logits, labels, pixel_weight=None, size=None).

    Shapes, memory, errors and source are those of the function.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        align_corners: bool = True,
        ignore_index: int = 255,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        backend: str | None = None,
        label_smoothing: float = 0.0,
        denominator: str = "labelled",
    ) -> None:
        super().__init__(
            temperature=temperature, align_corners=align_corners, ignore_index=ignore_index, class_weight=class_weight,
            reduction=reduction, backend=backend, label_smoothing=label_smoothing, denominator=denominator,
        )  # fmt: skip

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        pixel_weight: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        return ops.upsampled_cross_entropy(logits, labels, pixel_weight=pixel_weight, size=size, **self.settings())
