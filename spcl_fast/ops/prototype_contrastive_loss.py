"""prototype_contrastive_loss: every labelled pixel is pulled to its class's prototype and pushed from the others."""

from __future__ import annotations

from types import ModuleType

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
    Memory: the forward reads the features once and keeps 8 bytes a pixel, Triton 12 (+ 4 K where K <= D/4, if the backend finds that
    cheaper than computing them again); the backward reads them once more and writes the gradient, the only feature-sized allocation.
    In one pass (CUDA, only where asked for) the forward writes the gradient, too, and keeps it in the features' stead.
    Source: Xie et al., arXiv 2111.12358, L_cl; `core/utils/loss.py` of the released code (temperature 100).
    """
    checks.check_pixels(_OP, features, labels)
    _check_prototypes(features, prototypes, variances)
    checks.check_temperature(_OP, temperature)
    checks.check_options(_OP, ignore_index=ignore_index, backend=backend, normalize=normalize)
    checks.check_reduction(_OP, reduction)
    rows = features.dim() == 2
    grid = (features.shape[0],) if rows else (features.shape[0], *features.shape[2:])
    checks.check_constant(_OP, "class_weight", class_weight, ((prototypes.shape[0],),), "one weight a class")
    checks.check_constant(_OP, "pixel_weight", pixel_weight, (grid, tuple(labels.shape)), "one weight a pixel")
    checks.check_device(
        _OP, features, "features", prototypes=prototypes, class_weight=class_weight, pixel_weight=pixel_weight
    )
    if rows:
        features, labels = features.t()[None, :, :, None], labels[None, :, None]
        pixel_weight = None if pixel_weight is None else pixel_weight[None, :, None]
    if pixel_weight is not None:
        pixel_weight = resize_nearest(pixel_weight, *features.shape[2:]).to(_wide(features))
    class_weight = None if class_weight is None else class_weight.to(_wide(features))
    recorded = torch.is_grad_enabled()
    small = backends.is_small(
        features.numel()
    )  # here, not in the op: what is traced must save what is run saves, and the backend decides
    loss = _forward(
        features, labels, prototypes, class_weight, pixel_weight, variances, float(temperature), normalize, ignore_index, reduction,
        recorded and features.requires_grad, recorded and prototypes.requires_grad, backend or "", small,
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


def _backend(name: str, small: bool, features: Tensor, num_classes: int, has_variances: bool) -> ModuleType:
    """The module that does it; features: or their gradient."""
    picked = backends.pick(
        _OP,
        name or None,
        device=features.device,
        dtype=features.dtype,
        num_classes=num_classes,
        dim=features.shape[1],
        has_variances=has_variances,
        small=small,
    )
    return backends.module(picked)


def _in_one_pass(
    used: ModuleType, features: Tensor, num_classes: int, reduction: str, needs_dfeatures: bool, needs_dprototypes: bool
) -> bool:
    """Whether the forward forms the gradient of the features, too. A map's incoming gradient is another for each pixel."""
    wanted = needs_dfeatures and not needs_dprototypes and reduction != "none"
    return wanted and getattr(used, "takes_one_pass", lambda *_: False)(features, num_classes)


@torch.library.custom_op("spcl_fast::prototype_contrastive_forward", mutates_args=())
def _forward(
    features: Tensor, labels: Tensor, prototypes: Tensor,
    class_weight: Tensor | None, pixel_weight: Tensor | None, variances: Tensor | None,
    temperature: float, normalize: bool, ignore_index: int, reduction: str, needs_dfeatures: bool, needs_dprototypes: bool, backend: str,
    small: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> loss, denominator, lse, inv_norm, logits, and nothing [0]; or, in one pass, loss, four times nothing, dfeatures."""
    used = _backend(backend, small, features, prototypes.shape[0], variances is not None)
    settings = {
        "temperature": temperature,
        "normalize": normalize,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    if _in_one_pass(used, features, prototypes.shape[0], reduction, needs_dfeatures, needs_dprototypes):
        loss, dfeatures = used.prototype_contrastive_one_pass(
            features, labels, prototypes, class_weight, pixel_weight, **settings
        )
        return loss, *(loss.new_empty(0) for _ in range(4)), dfeatures
    save = needs_dfeatures or needs_dprototypes
    saved = used.prototype_contrastive_forward(
        features, labels, prototypes, class_weight, pixel_weight, variances, **settings, save=save
    )
    return *saved, features.new_empty(0)


@_forward.register_fake
def _(
    features, labels, prototypes, class_weight, pixel_weight, variances,
    temperature, normalize, ignore_index, reduction, needs_dfeatures, needs_dprototypes, backend, small=False,
):  # fmt: skip
    batch, dim, height, width = features.shape
    num_classes, save = prototypes.shape[0], needs_dfeatures or needs_dprototypes
    used = _backend(backend, small, features, num_classes, variances is not None)
    saves_logits = save and getattr(used, "saves_logits", lambda *_: False)(num_classes, dim, features.dtype)

    def empty(*shape, dtype=None):
        return features.new_empty(shape, dtype=dtype or _wide(features))

    if _in_one_pass(used, features, num_classes, reduction, needs_dfeatures, needs_dprototypes):
        return empty(), *(empty(0) for _ in range(4)), torch.empty_like(features)
    pixels = (batch, height * width) if save else (0,)
    loss = empty(batch, height, width) if reduction == "none" else empty()
    logits = empty(*((batch, num_classes, height * width) if saves_logits else (0,)))
    lse = empty(*pixels, dtype=getattr(used, "LSE_DTYPE", None))
    return loss, empty(), lse, empty(*pixels), logits, features.new_empty(0)


@torch.library.custom_op("spcl_fast::prototype_contrastive_backward", mutates_args=())
def _backward(
    grad_loss: Tensor, features: Tensor, labels: Tensor, prototypes: Tensor, class_weight: Tensor | None, pixel_weight: Tensor | None,
    variances: Tensor | None, lse: Tensor, inv_norm: Tensor, logits: Tensor, denominator: Tensor,
    temperature: float, normalize: bool, ignore_index: int, reduction: str, needs_dfeatures: bool, needs_dprototypes: bool, backend: str,
    small: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    used = _backend(backend, small, features, prototypes.shape[0], variances is not None)
    return used.prototype_contrastive_backward(
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
    features, labels, prototypes, class_weight, pixel_weight, variances, *ctx.settings, _, _, ctx.backend, ctx.small = (
        inputs
    )
    loss, denominator, lse, inv_norm, logits, dfeatures = output
    ctx.mark_non_differentiable(denominator, lse, inv_norm, logits, dfeatures)
    ctx.set_materialize_grads(False)
    ctx.one_pass, ctx.num_classes = dfeatures.dim() == 4, prototypes.shape[0]
    if ctx.one_pass:
        ctx.save_for_backward(dfeatures)
    else:
        ctx.save_for_backward(
            features, labels, prototypes, class_weight, pixel_weight, variances, lse, inv_norm, logits, denominator
        )


def _autograd_backward(ctx, grad_loss, *_):
    nothing = [None] * 14
    if grad_loss is None:
        return tuple(nothing)
    if ctx.one_pass:
        nothing[0] = _formed_gradient(ctx, grad_loss)
        return tuple(nothing)
    prototypes = ctx.saved_tensors[2]
    needs_dfeatures, needs_dprototypes = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    choice = (ctx.backend, ctx.small)
    dfeatures, dprototypes = _backward(
        grad_loss, *ctx.saved_tensors, *ctx.settings, needs_dfeatures, needs_dprototypes, *choice
    )
    nothing[0] = dfeatures if needs_dfeatures else None
    nothing[2] = dprototypes.to(prototypes.dtype) if needs_dprototypes else None
    return tuple(nothing)


@torch.library.custom_op("spcl_fast::prototype_contrastive_scale", mutates_args=("dfeatures",))
def _scale(dfeatures: Tensor, grad_loss: Tensor, num_classes: int, backend: str, small: bool = False) -> None:
    _backend(backend, small, dfeatures, num_classes, False).prototype_contrastive_scale(dfeatures, grad_loss)


def _formed_gradient(ctx, grad_loss: Tensor) -> Tensor:
    """The gradient that the forward formed, scaled where it lies: it is the returned one, unless the graph is kept for another backward."""
    if torch.is_grad_enabled():
        checks.refuse_double_backward(_OP)(ctx)
    (dfeatures,) = ctx.saved_tensors
    if torch._C._autograd._get_current_graph_task_keep_graph():
        dfeatures = dfeatures.clone()
    _scale(dfeatures, grad_loss, ctx.num_classes, ctx.backend, ctx.small)
    return dfeatures


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward.register_autograd(checks.refuse_double_backward(_OP), setup_context=lambda ctx, inputs, output: None)
