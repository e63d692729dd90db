"""torch's two calls `F.cross_entropy(F.interpolate(input, ...), target, ...)` in one, with torch's argument names.

from spcl_fast.compat.torch import cross_entropy_of_upsampled
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


def cross_entropy_of_upsampled(
    input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, *, size: int | tuple[int, int] | None = None, align_corners: bool | None = None,
) -> Tensor:  # fmt: skip
    """F.cross_entropy(F.interpolate(input, size, mode="bilinear", align_corners=align_corners), target, weight, ...).

    input         [N, C, h, w], float32, bfloat16 or float16.
    target        [N, H, W] class indices (any integer dtype), or probabilities [N, C, H, W].
    size          (H, W) of the interpolation; None: the target's.
    align_corners None is False, as in F.interpolate.

    Defaults, weights (the mean divides by the summed weights of labelled pixels), smoothing and reductions are torch's. Different: float32
    results for half inputs; nothing labelled gives 0, where torch's mean gives NaN; a second derivative is refused.
    Raises ValueError for a target outside [0, C) on the CPU, where torch raises IndexError.
    Memory: the up-sampled logits are never there, forward or backward; the gradient is [N, C, h, w].
    """
    if size is not None:
        size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    integers = isinstance(target, Tensor) and not target.is_floating_point()
    if size is not None and tuple(target.shape[-2:]) != size:
        raise ValueError(
            f"cross_entropy_of_upsampled: size {size} is not that of the target, {list(target.shape[-2:])}; expected them equal"
        )
    denominator: str | Tensor = "labelled"
    if not integers and reduction == "mean":  # torch divides by the pixels, whatever their probabilities sum to
        denominator = "all"
    return ops.upsampled_cross_entropy(
        input, target, class_weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
        align_corners=bool(align_corners), denominator=denominator,
    )  # fmt: skip


class CrossEntropyLossOfUpsampled(nn.Module):
    """nn.CrossEntropyLoss on scores that are still small: same arguments, forward(input [N, C, h, w], target [N, H, W]) -> [].

    Everything else as in `cross_entropy_of_upsampled`.
    """

    weight: Tensor | None

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0, *,
        align_corners: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.align_corners = align_corners

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy_of_upsampled(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing, align_corners=self.align_corners
        )  # fmt: skip
