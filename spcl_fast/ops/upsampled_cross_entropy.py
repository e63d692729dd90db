"""upsampled_cross_entropy and upsampled_binary_cross_entropy: losses of bilinearly up-sampled logits, without the up-sampled logits."""

from __future__ import annotations

from torch import Tensor

from ..backends.contract import UpsampledLoss
from . import checks
from .recorded_upsampled import recorded

_OP = "upsampled_cross_entropy"
_BINARY = "upsampled_binary_cross_entropy"


def upsampled_cross_entropy(
    logits: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W], any integer dtype or bool; or floating [B, K, g, f]
    *,
    temperature: float = 1.0,
    align_corners: bool = True,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,  # [K]
    pixel_weight: Tensor | None = None,  # [B, H, W]
    reduction: str = "mean",
    backend: str | None = None,
    label_smoothing: float = 0.0,
    denominator: str | Tensor = "labelled",
    size: tuple[int, int] | None = None,
) -> Tensor:  # [] or, for reduction="none", [B, H, W]; float32 (float64 for float64 logits)
    """F.cross_entropy(F.interpolate(logits, labels' size, mode="bilinear") / temperature, labels), differentiable once in `logits`.

    logits [B, K, h, w]; labels [B, H, W] integers; class_weight [K]; pixel_weight [B, H, W] -> [] or, for reduction="none", [B, H, W].
    align_corners=True, as SPCL's code; F.interpolate's and mmsegmentation's default is False: pass what your head was trained with.
    Weights, reductions, smoothing, denominator and ignored pixels as in `prototype_contrastive_loss`; any size ratio, up and down.
    Floating labels are probabilities, up-sampled by the same rule to `size`, or where that is None to pixel_weight's size, or else used at
    their own; the logits are up-sampled to the same size. A pixel whose probabilities are all 0 is unlabelled.
    A class that is -inf at every corner of a pixel's cell has probability 0 there and adds nothing; -inf of weight 0 does not count.
    NaN and inf make a pixel's loss NaN wherever they reach it in F.interpolate: in the cells around the node, also with weight 0; at
    equal size nothing is mixed. Finite logits, however low, give a finite loss.
    Raises ValueError or TypeError for what does not fit; on the CPU ValueError for a label outside [0, K) that is not ignore_index.
    Memory: never holds the up-sampled logits. The gradient, of the logits' size in float32, is formed in the forward pass for an
    incoming gradient of 1 and scaled in the backward, so a float16 loss scale loses nothing.
    Source: the segmentation loss of SPCL, arXiv 2111.12358 (temperature 1.8 in the released code).
    """
    checks.check_logits(_OP, logits)
    checks.check_share(_OP, "label_smoothing", label_smoothing)
    if isinstance(labels, Tensor) and labels.dtype in checks.FLOATS and labels.dim() == 4:
        _check_probabilities(logits, labels)
        checks.check_options(_OP, ignore_index=ignore_index, backend=backend)
        checks.refuse_ignored_class(_OP, "probabilities as labels", ignore_index)
        size = _size_of_probabilities(labels, size, pixel_weight)
    else:
        labels = _integer_labels(_OP, logits, labels)
        if size is not None and tuple(size) != tuple(labels.shape[1:]):
            raise ValueError(
                f"{_OP}: size {tuple(size)} is not that of the labels, {list(labels.shape[1:])}; integer labels say the size"
            )
        size = None
    problem = UpsampledLoss(
        logits, labels, class_weight, pixel_weight, temperature, align_corners, ignore_index, reduction, float(label_smoothing), size=size
    )  # fmt: skip
    return recorded(_OP, _checked(_OP, problem, denominator, backend), backend or "")


def upsampled_binary_cross_entropy(
    logits: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W], any integer dtype or bool
    *,
    class_weight: Tensor | None = None,  # [K]
    pixel_weight: Tensor | None = None,  # [B, H, W]
    gamma: float = 0.0,
    temperature: float = 1.0,
    align_corners: bool = True,
    ignore_index: int = 255,
    reduction: str = "mean",
    denominator: str | Tensor = "labelled",
    backend: str | None = None,
) -> Tensor:  # [] or, for reduction="none", [B, H, W]; float32 (float64 for float64 logits)
    """Sigmoid or, with gamma > 0, focal loss of up-sampled logits against the labels' one-hot, which is never made.

        z = F.interpolate(logits, labels' size, mode="bilinear") / temperature,   q_k = sigmoid(z_k) if k = label else 1 - sigmoid(z_k)
        loss of a pixel = - sum_k class_weight_k (1 - q_k)^gamma log q_k

    logits [B, K, h, w], labels [B, H, W] -> []. The mean divides by the number of labelled pixels. Differentiable once in `logits`;
    everything else as in `upsampled_cross_entropy`.
    Source: Lin et al., Focal Loss, arXiv 1708.02002.
    """
    checks.check_logits(_BINARY, logits)
    checks.check_finite(_BINARY, "gamma", gamma)
    if gamma < 0:
        raise ValueError(f"{_BINARY}: gamma must be at least 0, got {gamma}")
    labels = _integer_labels(_BINARY, logits, labels)
    problem = UpsampledLoss(
        logits, labels, class_weight, pixel_weight, temperature, align_corners, ignore_index, reduction, gamma=float(gamma)
    )  # fmt: skip
    return recorded(_BINARY, _checked(_BINARY, problem, denominator, backend), backend or "")


def _integer_labels(op: str, logits: Tensor, labels: Tensor) -> Tensor:
    checks.check_labels_tensor(op, labels, 3, "[B, H, W]")
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{op}: logits and labels must hold as many images, got {list(logits.shape)} and {list(labels.shape)}"
        )
    return checks.as_integers(labels)


def _check_probabilities(logits: Tensor, labels: Tensor) -> None:
    checks.check_strided(_OP, "labels", labels)
    if labels.shape[:2] != logits.shape[:2] or 0 in labels.shape[2:]:
        raise ValueError(
            f"{_OP}: labels of dtype {str(labels.dtype).removeprefix('torch.')} are probabilities and must be [B, K, g, f] with the "
            f"logits' B and K, got {list(labels.shape)} for logits {list(logits.shape)}"
        )
    if labels.requires_grad:
        raise ValueError(f"{_OP}: labels require grad, but are constants of the loss; pass labels.detach()")


def _size_of_probabilities(
    labels: Tensor, size: tuple[int, int] | None, pixel_weight: Tensor | None
) -> tuple[int, int] | None:
    if size is not None:
        checks.check_size(_OP, size)
        return int(size[0]), int(size[1])
    if pixel_weight is not None and pixel_weight.dim() == 3:
        return pixel_weight.shape[1], pixel_weight.shape[2]
    return None


def _checked(op: str, problem: UpsampledLoss, denominator: str | Tensor, backend: str | None) -> UpsampledLoss:
    """What both losses check, with weights and denominator in the loss's dtype."""
    p, logits = problem, problem.logits
    checks.check_temperature(op, p.temperature)
    checks.check_options(op, ignore_index=p.ignore_index, backend=backend, align_corners=p.align_corners)
    checks.check_reduction(op, p.reduction)
    shape = (logits.shape[0], *p.output_size)
    checks.check_constant(op, "class_weight", p.class_weight, ((logits.shape[1],),), "one weight per class")
    checks.check_constant(op, "pixel_weight", p.pixel_weight, (shape,), "the labels' shape")
    checks.check_device(op, logits, "logits", labels=p.labels, class_weight=p.class_weight, pixel_weight=p.pixel_weight)
    wide = checks.wide(logits)
    return p._replace(
        temperature=float(p.temperature),
        class_weight=None if p.class_weight is None else p.class_weight.to(wide),
        pixel_weight=None if p.pixel_weight is None else p.pixel_weight.to(wide),
        denominator=checks.denominator_of(op, denominator, p.reduction, logits, shape),
    )
