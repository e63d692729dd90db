"""prototype_contrastive_loss: every labelled pixel is pulled to its class's prototype and pushed from the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, Backend, Contrast, Gradients, Saved, Wanted
from ..backends.labels import resize_nearest
from . import checks, dispatched

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
    variances     adds  1/2 <(x/|x|)^2, variances_k> / temperature^2  to logit k.
    reduction     "mean" | "sum" | "none" (the map, 0 where ignored). Nothing labelled: 0, and gradient 0.
    backend       "reference" | "cpu" | "triton" | "cuda"; None: the fastest usable one.

    Raises ValueError or TypeError for shapes, dtypes, devices and settings that do not fit, before any kernel runs; on the CPU ValueError
    for a label outside [0, K) that is not ignore_index (on a GPU the loss is NaN and `check_labels` tells the label).
    Memory: the forward reads the features once and keeps 8 bytes per pixel, Triton 12 (+ 4 K where K <= D/4, if the backend finds that
    cheaper than computing them again); the backward reads them once more and writes the gradient, the only feature-sized allocation.
    In one pass (CUDA, only where asked for) the forward writes the gradient, too, and keeps it instead of the features.
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
    contrast = Contrast(
        features, labels, prototypes, class_weight, pixel_weight, variances, float(temperature), normalize, ignore_index, reduction
    )  # fmt: skip
    loss = _recorded(contrast, backend or "")
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


# ---- the struct through the dispatcher --------------------------------------------------------------------------------

_FEATURES, _PROTOTYPES, _BIAS, _TEMPERATURE = (
    0,
    1,
    6,
    7,
)  # places in the list of tensors of those that may be differentiated
_PLAIN_TENSORS = 6  # what is in the list where no option is in use


class _Packed(NamedTuple):
    tensors: list[Tensor | None]
    numbers: list[float]
    integers: list[int]
    line: str


def _pack(contrast: Contrast, wanted: Wanted, backend: str, small: bool) -> _Packed:
    c = contrast
    tensors = [c.features, c.prototypes, c.labels, c.class_weight, c.pixel_weight, c.variances]
    line = dispatched.line(
        c.reduction, "normalize" if c.normalize else "", "small" if small else "", f"@{backend}" if backend else "",
        "dfeatures" if wanted.features else "", "dprototypes" if wanted.prototypes else "",
    )  # fmt: skip
    return _Packed(tensors, [c.temperature], [c.ignore_index], line)


def _unpack(tensors: Sequence[Tensor | None], numbers: Sequence[float], integers: Sequence[int], line: str) -> Contrast:
    words = dispatched.words(line)
    features, prototypes, labels, class_weight, pixel_weight, variances, *_ = tensors
    return Contrast(
        features, labels, prototypes, class_weight, pixel_weight, variances, numbers[0], "normalize" in words, integers[0],
        dispatched.one_of(line, "mean", "sum", "none"),
    )  # fmt: skip


def _wanted(line: str) -> Wanted:
    words = dispatched.words(line)
    return Wanted("dfeatures" in words, "dprototypes" in words, "dbias" in words, "dtemperature" in words)


def _needs(contrast: Contrast) -> frozenset[str]:
    return frozenset(("variances",)) if contrast.variances is not None else frozenset()


def _backend(contrast: Contrast, line: str) -> Backend:
    features = contrast.features
    small = "small" in dispatched.words(line)
    ask = Ask(_OP, features.device, features.dtype, *contrast.prototypes.shape[-2:], small, _needs(contrast))
    return backends.choose(ask, dispatched.named_backend(line))


@torch.library.custom_op("spcl_fast::prototype_contrastive_forward", mutates_args=())
def _forward(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], integers: Sequence[int], line: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, and the parts of Saved."""
    contrast = _unpack(tensors, numbers, integers, line)
    loss, saved = _backend(contrast, line).contrast_forward(contrast, _wanted(line))
    return loss, *saved


@_forward.register_fake
def _(tensors, numbers, integers, line):
    contrast, wanted = _unpack(tensors, numbers, integers, line), _wanted(line)
    features, wide = contrast.features, _wide(contrast.features)
    batch, _, height, width = features.shape
    like = _backend(contrast, line).saved_like(contrast, wanted)

    def empty(*shape, dtype=wide):
        return features.new_empty(shape, dtype=dtype)

    if like.one_pass:
        return empty(), *(empty(0) for _ in range(4)), torch.empty_like(features)
    pixels = (batch, height * width) if any(wanted) else (0,)
    loss = empty(batch, height, width) if contrast.reduction == "none" else empty()
    logits = empty(*((batch, contrast.prototypes.shape[-2], height * width) if like.logits else (0,)))
    return loss, empty(), empty(*pixels, dtype=like.lse), empty(*pixels), logits, features.new_empty(0)


@torch.library.custom_op("spcl_fast::prototype_contrastive_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    features: Tensor,
    prototypes: Tensor,
    others: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    numbers: Sequence[float],
    integers: Sequence[int],
    line: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> Gradients. What may be differentiated again does not hide in a list, so that it is refused with a reason."""
    contrast = _unpack([features, prototypes, *others], numbers, integers, line)
    return _backend(contrast, line).contrast_backward(grad_loss, contrast, Saved(*saved), _wanted(line))


@_backward.register_fake
def _(grad_loss, features, prototypes, others, saved, numbers, integers, line):
    contrast, wanted = _unpack([features, prototypes, *others], numbers, integers, line), _wanted(line)
    wide = _wide(features)
    return Gradients(
        torch.empty_like(features) if wanted.features else features.new_empty(0),
        prototypes.new_empty(prototypes.shape if wanted.prototypes else (0,), dtype=wide),
        contrast.bias.new_empty(contrast.bias.shape, dtype=wide)
        if wanted.bias
        else prototypes.new_empty(0, dtype=wide),
        prototypes.new_empty(() if wanted.temperature else (0,), dtype=wide),
    )


@torch.library.custom_op("spcl_fast::prototype_contrastive_scale", mutates_args=("dfeatures",))
def _scale(dfeatures: Tensor, grad_loss: Tensor, line: str) -> None:
    used = backends.choose(
        Ask(_OP, dfeatures.device, dfeatures.dtype, 1, dfeatures.shape[1]), dispatched.named_backend(line)
    )
    used.contrast_scale(dfeatures, grad_loss)


# ---- autograd ---------------------------------------------------------------------------------------------------------


class _Recorded(torch.autograd.Function):
    """apply(*tensors, numbers, integers, line) -> what `_forward` returns; the loss alone is differentiable."""

    @staticmethod
    def forward(*inputs):
        *tensors, numbers, integers, line = inputs
        return _forward(tensors, numbers, integers, line)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.numbers, ctx.integers, ctx.line = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.one_pass = saved[-1].dim() == 4
        if ctx.one_pass:
            ctx.save_for_backward(saved[-1])
        else:
            ctx.save_for_backward(*saved, *tensors)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        nothing = [None] * len(ctx.needs_input_grad)
        if grad_loss is None:
            return tuple(nothing)
        if ctx.one_pass:
            nothing[_FEATURES] = _formed_gradient(ctx, grad_loss)
            return tuple(nothing)
        kept = ctx.saved_tensors
        saved, tensors = list(kept[:5]), list(kept[5:])
        gradients = _backward(grad_loss, *tensors[:2], tensors[2:], saved, ctx.numbers, ctx.integers, ctx.line)
        for place, gradient in zip((_FEATURES, _PROTOTYPES, _BIAS, _TEMPERATURE), gradients, strict=True):
            if place < len(tensors) and ctx.needs_input_grad[place]:
                nothing[place] = gradient.to(tensors[place].dtype)
        return tuple(nothing)


_Transformed = dispatched.transformable(_Recorded, _OP)


def _formed_gradient(ctx, grad_loss: Tensor) -> Tensor:
    """The gradient that the forward formed, scaled where it lies: it is the returned one, unless the graph is kept for another backward."""
    if torch.is_grad_enabled():
        dispatched.refuse_double_backward(_OP)(ctx)
    (dfeatures,) = ctx.saved_tensors
    if torch._C._autograd._get_current_graph_task_keep_graph():
        dfeatures = dfeatures.clone()
    _scale(dfeatures, grad_loss, ctx.line)
    return dfeatures


def _recorded(contrast: Contrast, backend: str) -> Tensor:
    """The loss, recorded for autograd where a gradient may be asked for."""
    # here, not in the op: what is traced must save what is run saves, and the backend decides
    small = backends.is_small(contrast.features.numel())
    if dispatched.is_transformed():
        packed = _pack(contrast, Wanted(True, True), backend, small)
        return _Transformed.apply(*packed.tensors, packed.numbers, packed.integers, packed.line)[0]
    recorded = torch.is_grad_enabled()
    wanted = Wanted(recorded and contrast.features.requires_grad, recorded and contrast.prototypes.requires_grad)
    packed = _pack(contrast, wanted, backend, small)
    if any(wanted):
        return _Recorded.apply(*packed.tensors, packed.numbers, packed.integers, packed.line)[0]
    return _forward(*packed)[0]


dispatched.register(_forward, _backward, _OP)
