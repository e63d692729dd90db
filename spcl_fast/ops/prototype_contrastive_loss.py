"""prototype_contrastive_loss: every labelled pixel is pulled to its class's prototype and pushed from the others."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.labels import resize_nearest
from . import checks

_OP = "prototype_contrastive_loss"


def prototype_contrastive_loss(
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], any integer dtype
    prototypes: Tensor,  # [K, D]
    *,
    temperature: float,
    normalize: bool = True,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,  # [K]
    pixel_weight: Tensor | None = None,  # [B, h, w] or [B, H, W], or [N]
    variances: Tensor | None = None,  # [K, D]
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # [] or, for reduction="none", [B, h, w] or [N]; float32 (float64 for float64 features)
    """Pull each labelled pixel to its class prototype and push it from the others.

        loss = mean over labelled pixels of  -log softmax_k(<x/|x|, prototype_k> / temperature)[label]

    Differentiable once, in `features` and in `prototypes`.

    features      float32, bfloat16, float16 (float64: reference backend); any strides, no copy is made.
    labels        any integer dtype and any size: read at the features' pixels by the rule of F.interpolate(mode="nearest").
    prototypes    used as they are: they are not normalised here.
    normalize     False: the dot product with x itself.
    ignore_index  pixels with this label have loss 0 and gradient exactly 0.
    class_weight  as in F.cross_entropy: the mean divides by the summed class weights of the labelled pixels.
    pixel_weight  multiplies a pixel's loss and gradient and is not part of the mean's denominator.
    variances     adds  1/2 <(x/|x|)^2, variances_k> / temperature^2  to logit k (the DistCL loss of SePiCo).
    reduction     "mean" | "sum" | "none" (the map, 0 where ignored). Nothing labelled: 0, and gradient 0.
    backend       "reference" | "cpu" | "triton" | "cuda"; None: the fastest usable one.

    Raises ValueError or TypeError for shapes, dtypes, devices and settings that do not fit, before any kernel runs; on the CPU ValueError
    for a label outside [0, K) that is not ignore_index (on a GPU the loss is NaN and `check_labels` tells the label).
    Memory: the forward reads the features once and keeps 8 bytes a pixel (+ 4 K where K <= D/4, if the backend finds that cheaper than
    computing them again); the backward reads them once more and writes the gradient, which is the only feature-sized allocation.
    Source: Xie et al., arXiv 2111.12358, L_cl; `core/utils/loss.py` of the released code (temperature 100).
    """
    checks.check_pixels(_OP, features, labels)
    _check_prototypes(features, prototypes, variances)
    checks.check_temperature(_OP, temperature)
    checks.check_ignore_index(_OP, ignore_index)
    checks.check_reduction(_OP, reduction)
    rows = features.dim() == 2
    grid = (features.shape[0],) if rows else (features.shape[0], *features.shape[2:])
    checks.check_constant(_OP, "class_weight", class_weight, ((prototypes.shape[0],),), "one weight a class")
    checks.check_constant(_OP, "pixel_weight", pixel_weight, (grid, tuple(labels.shape)), "one weight a pixel")
    checks.check_device(_OP, features, "features", prototypes=prototypes, class_weight=class_weight, pixel_weight=pixel_weight)
    if rows:
        features, labels = features.t()[None, :, :, None], labels[None, :, None]
        pixel_weight = None if pixel_weight is None else pixel_weight[None, :, None]
    if pixel_weight is not None:
        pixel_weight = resize_nearest(pixel_weight, *features.shape[2:]).to(_wide(features))
    class_weight = None if class_weight is None else class_weight.to(_wide(features))
    save = torch.is_grad_enabled() and (features.requires_grad or prototypes.requires_grad)
    small = backends.is_small(features.numel())  # here, not in the op: what is traced must save what is run saves, and the backend decides
    loss = _forward(
        features, labels, prototypes, class_weight, pixel_weight, variances,
        float(temperature), normalize, ignore_index, reduction, save, backend or "", small,
    )[0]  # fmt: skip
    return loss.view(-1) if rows and reduction == "none" else loss


def _wide(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _check_prototypes(features: Tensor, prototypes: Tensor, variances: Tensor | None) -> None:
    checks.check_float(_OP, "prototypes", prototypes, (2,), "[K, D]")
    if prototypes.shape[1] != features.shape[1]:
        raise ValueError(
            f"{_OP}: prototypes must be [K, D] with the features' D, got {list(prototypes.shape)} for features {list(features.shape)}"
        )
    if prototypes.shape[0] == 0:
        raise ValueError(f"{_OP}: prototypes must have at least one row, got shape {list(prototypes.shape)}")
    checks.check_constant(_OP, "variances", variances, (tuple(prototypes.shape),), "the prototypes' shape")
    checks.check_device(_OP, features, "features", variances=variances)


def _pick(backend: str, small: bool, features: Tensor, prototypes: Tensor, variances: Tensor | None) -> str:
    num_classes, dim = prototypes.shape
    return backends.pick(
        _OP,
        backend or None,
        device=features.device,
        dtype=features.dtype,
        num_classes=num_classes,
        dim=dim,
        has_variances=variances is not None,
        small=small,
    )


@torch.library.custom_op("spcl_fast::prototype_contrastive_forward", mutates_args=())
def _forward(
    features: Tensor, labels: Tensor, prototypes: Tensor,
    class_weight: Tensor | None, pixel_weight: Tensor | None, variances: Tensor | None,
    temperature: float, normalize: bool, ignore_index: int, reduction: str, save: bool, backend: str, small: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    primitive = backends.module(_pick(backend, small, features, prototypes, variances)).prototype_contrastive_forward
    return primitive(
        features, labels, prototypes, class_weight, pixel_weight, variances,
        temperature=temperature, normalize=normalize, ignore_index=ignore_index, reduction=reduction, save=save,
    )  # fmt: skip


@_forward.register_fake
def _(
    features, labels, prototypes, class_weight, pixel_weight, variances, temperature, normalize, ignore_index, reduction, save, backend,
    small=False,
):  # fmt: skip
    batch, dim, height, width = features.shape
    num_classes = prototypes.shape[0]
    used = backends.module(_pick(backend, small, features, prototypes, variances))
    saves_logits = save and getattr(used, "saves_logits", lambda *_: False)(num_classes, dim, features.dtype)

    def empty(*shape):
        return features.new_empty(shape, dtype=_wide(features))

    pixels = (batch, height * width) if save else (0,)
    loss = empty(batch, height, width) if reduction == "none" else empty()
    return loss, empty(), empty(*pixels), empty(*pixels), empty(*((batch, num_classes, height * width) if saves_logits else (0,)))


@torch.library.custom_op("spcl_fast::prototype_contrastive_backward", mutates_args=())
def _backward(
    grad_loss: Tensor, features: Tensor, labels: Tensor, prototypes: Tensor, class_weight: Tensor | None, pixel_weight: Tensor | None,
    variances: Tensor | None, lse: Tensor, inv_norm: Tensor, logits: Tensor, denominator: Tensor,
    temperature: float, normalize: bool, ignore_index: int, reduction: str, needs_dfeatures: bool, needs_dprototypes: bool, backend: str,
    small: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    primitive = backends.module(_pick(backend, small, features, prototypes, variances)).prototype_contrastive_backward
    return primitive(
        grad_loss, features, labels, prototypes, class_weight, pixel_weight, variances, lse, inv_norm, logits, denominator,
        temperature=temperature, normalize=normalize, ignore_index=ignore_index, reduction=reduction,
        needs_dfeatures=needs_dfeatures, needs_dprototypes=needs_dprototypes,
    )  # fmt: skip


@_backward.register_fake
def _(
    grad_loss, features, labels, prototypes, class_weight, pixel_weight, variances, lse, inv_norm, logits, denominator,
    temperature, normalize, ignore_index, reduction, needs_dfeatures, needs_dprototypes, backend, small=False,
):  # fmt: skip
    dfeatures = torch.empty_like(features) if needs_dfeatures else features.new_empty(0)
    return dfeatures, prototypes.new_empty(prototypes.shape if needs_dprototypes else (0,), dtype=_wide(features))


def _setup_context(ctx, inputs, output):
    features, labels, prototypes, class_weight, pixel_weight, variances, *ctx.settings, _, ctx.backend, ctx.small = inputs
    loss, denominator, lse, inv_norm, logits = output
    ctx.mark_non_differentiable(denominator, lse, inv_norm, logits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, labels, prototypes, class_weight, pixel_weight, variances, lse, inv_norm, logits, denominator)


def _autograd_backward(ctx, grad_loss, *_):
    nothing = [None] * 13
    if grad_loss is None:
        return tuple(nothing)
    prototypes = ctx.saved_tensors[2]
    needs_dfeatures, needs_dprototypes = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    choice = (ctx.backend, ctx.small)
    dfeatures, dprototypes = _backward(grad_loss, *ctx.saved_tensors, *ctx.settings, needs_dfeatures, needs_dprototypes, *choice)
    nothing[0] = dfeatures if needs_dfeatures else None
    nothing[2] = dprototypes.to(prototypes.dtype) if needs_dprototypes else None
    return tuple(nothing)


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward.register_autograd(checks.refuse_double_backward(_OP), setup_context=lambda ctx, inputs, output: None)
