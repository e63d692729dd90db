"""upsampled_cross_entropy: cross-entropy of bilinearly up-sampled logits, without the up-sampled logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from . import checks

_OP = "upsampled_cross_entropy"


def upsampled_cross_entropy(
    logits: Tensor,  # [B, K, h, w]
    labels: Tensor,  # [B, H, W], any integer dtype
    *,
    temperature: float = 1.0,
    align_corners: bool = True,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,  # [K]
    pixel_weight: Tensor | None = None,  # [B, H, W]
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # [] or, for reduction="none", [B, H, W]; float32 (float64 for float64 logits)
    """F.cross_entropy(F.interpolate(logits, labels' size, mode="bilinear") / temperature, labels), differentiable once in `logits`.

    Weights, reductions and ignored pixels as in `prototype_contrastive_loss`; any size ratio, up and down.
    Raises ValueError or TypeError for what does not fit; on the CPU ValueError for a label outside [0, K) that is not ignore_index.
    Memory: never holds the up-sampled logits. The gradient, of the logits' size in float32, is formed in the forward pass for an
    incoming gradient of 1 and scaled in the backward, so a float16 loss scale loses nothing.
    Source: the segmentation loss of SPCL, arXiv 2111.12358 (temperature 1.8 in the released code).
    """
    checks.check_float(_OP, "logits", logits, (4,), "[B, K, h, w]")
    checks.check_labels_tensor(_OP, labels, 3, "[B, H, W]")
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{_OP}: logits and labels must hold as many images, got {list(logits.shape)} and {list(labels.shape)}"
        )
    if 0 in logits.shape[1:]:
        raise ValueError(f"{_OP}: logits must hold at least one class and one node, got shape {list(logits.shape)}")
    checks.check_temperature(_OP, temperature)
    checks.check_options(_OP, ignore_index=ignore_index, backend=backend, align_corners=align_corners)
    checks.check_reduction(_OP, reduction)
    checks.check_constant(_OP, "class_weight", class_weight, ((logits.shape[1],),), "one weight a class")
    checks.check_constant(_OP, "pixel_weight", pixel_weight, (tuple(labels.shape),), "the labels' shape")
    checks.check_device(_OP, logits, "logits", labels=labels, class_weight=class_weight, pixel_weight=pixel_weight)
    needs_dlogits = torch.is_grad_enabled() and logits.requires_grad
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    class_weight = None if class_weight is None else class_weight.to(wide)
    pixel_weight = None if pixel_weight is None else pixel_weight.to(wide)
    return _forward(
        logits,
        labels,
        class_weight,
        pixel_weight,
        float(temperature),
        align_corners,
        ignore_index,
        reduction,
        needs_dlogits,
        backend or "",
    )[0]


@torch.library.custom_op("spcl_fast::upsampled_cross_entropy", mutates_args=())
def _forward(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, pixel_weight: Tensor | None,
    temperature: float, align_corners: bool, ignore_index: int, reduction: str, needs_dlogits: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    name = backends.pick(
        _OP,
        backend or None,
        device=logits.device,
        dtype=logits.dtype,
        num_classes=logits.shape[1],
        dim=logits.shape[1],
        has_variances=False,
        small=backends.is_small(labels.numel() * logits.shape[1]),
    )
    return backends.module(name).upsampled_cross_entropy_forward(
        logits, labels, class_weight, pixel_weight, temperature=temperature, align_corners=align_corners, ignore_index=ignore_index,
        reduction=reduction, needs_dlogits=needs_dlogits and reduction != "none",
    )  # fmt: skip


@_forward.register_fake
def _(
    logits,
    labels,
    class_weight,
    pixel_weight,
    temperature,
    align_corners,
    ignore_index,
    reduction,
    needs_dlogits,
    backend,
):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    formed = needs_dlogits and reduction != "none"
    loss = logits.new_empty(labels.shape if reduction == "none" else (), dtype=wide)
    return loss, logits.new_empty(logits.shape if formed else (0,), dtype=wide)


def _setup_context(ctx, inputs, output):
    logits, labels, class_weight, pixel_weight, *ctx.settings, ctx.reduction, _, ctx.backend = inputs
    _, dlogits = output
    ctx.mark_non_differentiable(dlogits)
    ctx.set_materialize_grads(False)
    if ctx.reduction == "none":  # nothing could be formed yet: the incoming gradient is a map
        ctx.save_for_backward(logits, labels, class_weight, pixel_weight)
    else:
        ctx.save_for_backward(logits, dlogits)


def _autograd_backward(ctx, grad_loss, _):
    nothing = [None] * 10
    if grad_loss is None:
        return tuple(nothing)
    if (
        ctx.reduction == "none"
    ):  # the gradient of sum(map * grad) is that of the summed loss with the grad as pixel weights
        logits, labels, class_weight, pixel_weight = ctx.saved_tensors
        weight = grad_loss if pixel_weight is None else grad_loss * pixel_weight
        dlogits = _forward(logits.detach(), labels, class_weight, weight, *ctx.settings, "sum", True, ctx.backend)[1]
    else:
        logits, dlogits = ctx.saved_tensors
        dlogits = dlogits * grad_loss
    nothing[0] = _gradient(logits, dlogits)
    return tuple(nothing)


@torch.library.custom_op("spcl_fast::upsampled_cross_entropy_gradient", mutates_args=())
def _gradient(logits: Tensor, dlogits: Tensor) -> Tensor:
    """The gradient in the logits' dtype, as an op of its own so that differentiating it again is refused in words."""
    return dlogits.to(logits.dtype, copy=True)


@_gradient.register_fake
def _(logits, dlogits):
    return dlogits.new_empty(dlogits.shape, dtype=logits.dtype)


_gradient.register_autograd(checks.refuse_double_backward(_OP), setup_context=lambda ctx, inputs, output: None)
_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
