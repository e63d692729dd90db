"""prototype_contrastive_loss through torch's dispatcher and autograd: what is traced, saved and differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, Backend, Contrast, Gradients, Saved, Teacher, Wanted
from . import checks, dispatched

_OP = "prototype_contrastive_loss"


# ---- the struct through the dispatcher --------------------------------------------------------------------------------

_FEATURES, _PROTOTYPES, _BIAS, _TEMPERATURE = (
    0,
    1,
    6,
    7,
)  # places in the list of tensors of those that may be differentiated


class _Packed(NamedTuple):
    tensors: list[Tensor | None]
    numbers: list[float]
    integers: list[int]
    line: str


def _pack(contrast: Contrast, wanted: Wanted, backend: str, small: bool) -> _Packed:
    c = contrast
    teacher = c.labels if isinstance(c.labels, Teacher) else None
    labels = c.labels if isinstance(c.labels, Tensor) else None
    tensors: list[Tensor | None] = [c.features, c.prototypes, labels, c.class_weight, c.pixel_weight, c.variances]
    temperature, number = (c.temperature, 1.0) if isinstance(c.temperature, Tensor) else (None, c.temperature)
    numbers, integers = [number], [c.ignore_index]
    options: list[str] = []
    if teacher or any(option is not None for option in (c.bias, temperature, c.prototype_class, c.denominator)):
        tensors += [c.bias, temperature, c.prototype_class, c.denominator]
        integers.append(c.classes)
    if c.label_smoothing or c.margin or teacher:
        numbers += [c.label_smoothing, c.margin]
    if teacher:
        tensors += [teacher.features, teacher.prototypes, teacher.u, teacher.v]
        numbers.append(teacher.temperature)
    if c.pool != "logsumexp" or c.loss != "softmax" or not c.positive_variance:
        options = [c.pool, c.loss, "" if c.positive_variance else "no_positive_variance"]
    line = dispatched.line(
        c.reduction, "normalize" if c.normalize else "", "small" if small else "", f"@{backend}" if backend else "",
        "dfeatures" if wanted.features else "", "dprototypes" if wanted.prototypes else "", "dbias" if wanted.bias else "",
        "dtemperature" if wanted.temperature else "", *options,
    )  # fmt: skip
    return _Packed(tensors, numbers, integers, line)


def _unpack(tensors: Sequence[Tensor | None], numbers: Sequence[float], integers: Sequence[int], line: str) -> Contrast:
    words = dispatched.words(line)
    features, prototypes, labels, class_weight, pixel_weight, variances, *options = tensors
    assert features is not None and prototypes is not None
    targets = _teacher(options[4:], numbers[3]) if labels is None else labels
    contrast = Contrast(
        features, targets, prototypes, class_weight, pixel_weight, variances, numbers[0], "normalize" in words, integers[0],
        dispatched.one_of(line, "mean", "sum", "none"),
    )  # fmt: skip
    if options or len(numbers) > 1 or words & {"max", "sigmoid", "no_positive_variance"}:
        return _with_options(contrast, options, numbers[1:], integers[1:], line)
    return contrast


def _teacher(tensors: Sequence[Tensor | None], temperature: float) -> Teacher:
    features, prototypes, u, v = tensors
    assert features is not None and prototypes is not None and u is not None and v is not None
    return Teacher(features, prototypes, temperature, u, v)


def _with_options(
    contrast: Contrast, tensors: Sequence[Tensor | None], numbers: Sequence[float], integers: Sequence[int], line: str
) -> Contrast:
    words = dispatched.words(line)
    c = contrast._replace(
        pool=dispatched.one_of(line, "logsumexp", "max"), loss=dispatched.one_of(line, "softmax", "sigmoid"),
        positive_variance="no_positive_variance" not in words,
    )  # fmt: skip
    if numbers:
        c = c._replace(label_smoothing=numbers[0], margin=numbers[1])
    if tensors:
        bias, temperature, classes, denominator = tensors[:4]
        c = c._replace(
            bias=bias, prototype_class=classes, denominator=denominator, classes=integers[0],
            temperature=c.temperature if temperature is None else temperature,
        )  # fmt: skip
    return c


def _wanted(line: str) -> Wanted:
    words = dispatched.words(line)
    return Wanted("dfeatures" in words, "dprototypes" in words, "dbias" in words, "dtemperature" in words)


_PLAIN = frozenset()


def _needs(c: Contrast, wanted: Wanted) -> frozenset[str]:
    """The options in use, by their names in contract.NEEDS."""
    if c[10:] == _NO_OPTIONS and c.variances is None and c.prototypes.dim() == 2 and not _is_soft(c.labels):
        return frozenset(("tensor_temperature",)) if isinstance(c.temperature, Tensor) else _PLAIN
    used = {
        "variances": c.variances is not None,
        "per_image_prototypes": c.prototypes.dim() == 3,
        "bias": c.bias is not None,
        "tensor_temperature": isinstance(c.temperature, Tensor),
        "probabilities": isinstance(c.labels, Tensor) and c.labels.is_floating_point(),
        "teacher": isinstance(c.labels, Teacher),
        "label_smoothing": c.label_smoothing > 0,
        "prototype_class": c.prototype_class is not None,
        "margin": c.margin != 0,
        "no_positive_variance": c.variances is not None and not c.positive_variance,
        "denominator": c.denominator is not None,
        "sigmoid": c.loss == "sigmoid",
        "dbias": wanted.bias,
        "dtemperature": wanted.temperature,
    }
    return frozenset(name for name, is_used in used.items() if is_used)


_NO_OPTIONS = tuple(Contrast._field_defaults.values())


def _is_soft(labels: Tensor | Teacher) -> bool:
    return isinstance(labels, Teacher) or labels.is_floating_point()


def _backend(contrast: Contrast, line: str) -> Backend:
    features, words = contrast.features, dispatched.words(line)
    needs = _needs(contrast, _wanted(line))
    num_rows, dim = contrast.prototypes.shape[-2:]
    ask = Ask(_OP, features.device, features.dtype, num_rows, dim, "small" in words, needs)
    return backends.choose(ask, dispatched.named_backend(line))


def _resolved(contrast: Contrast) -> Contrast:
    """With the number of classes that prototype_class has, where nobody has said it before the op was called."""
    if contrast.prototype_class is None or contrast.classes:
        return contrast
    return contrast._replace(classes=int(contrast.prototype_class.max()) + 1)


@torch.library.custom_op("spcl_fast::prototype_contrastive_forward", mutates_args=())
def _forward(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], integers: Sequence[int], line: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, and the parts of Saved."""
    contrast = _unpack(tensors, numbers, integers, line)
    loss, saved = _backend(contrast, line).contrast_forward(_resolved(contrast), _wanted(line))
    return loss, saved.denominator, saved.lse, saved.inv_norm, saved.logits, saved.dfeatures


@_forward.register_fake
def _(tensors, numbers, integers, line):
    contrast, wanted = _unpack(tensors, numbers, integers, line), _wanted(line)
    features, wide = contrast.features, checks.wide(contrast.features)
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
    saved: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    integers: Sequence[int],
    line: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> Gradients."""
    contrast = _unpack(tensors, numbers, integers, line)
    return _backend(contrast, line).contrast_backward(grad_loss, _resolved(contrast), Saved(*saved), _wanted(line))


@_backward.register_fake
def _(grad_loss, saved, tensors, numbers, integers, line):
    contrast, wanted = _unpack(tensors, numbers, integers, line), _wanted(line)
    features, prototypes, wide = contrast.features, contrast.prototypes, checks.wide(contrast.features)
    bias = contrast.bias if wanted.bias else None
    return Gradients(
        torch.empty_like(features) if wanted.features else features.new_empty(0),
        prototypes.new_empty(prototypes.shape if wanted.prototypes else (0,), dtype=wide),
        prototypes.new_empty(0 if bias is None else bias.shape, dtype=wide),
        prototypes.new_empty(() if wanted.temperature else (0,), dtype=wide),
    )


@torch.library.custom_op("spcl_fast::prototype_contrastive_scale", mutates_args=("dfeatures",))
def _scale(dfeatures: Tensor, grad_loss: Tensor, line: str) -> None:
    used = backends.choose(
        Ask(_OP, dfeatures.device, dfeatures.dtype, 1, dfeatures.shape[1]), dispatched.named_backend(line)
    )
    used.contrast_scale(dfeatures, grad_loss)


for _op in (_forward, _backward):
    _op.register_vmap(dispatched.looped_over_batch(_op))

# ---- autograd ---------------------------------------------------------------------------------------------------------


_run_forward = dispatched.direct(_forward)
_gradients = dispatched.once(dispatched.direct(_backward), _OP)


class _Derivative:
    """apply(*tensors, numbers, integers, line) -> what `_forward` returns; the loss alone is differentiable."""

    @staticmethod
    def compute(*inputs):
        *tensors, numbers, integers, line = inputs
        return _run_forward(tensors, numbers, integers, line)

    @staticmethod
    def keep(ctx, inputs, output):
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
        nothing: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_loss is None:
            return tuple(nothing)
        if ctx.one_pass:
            nothing[_FEATURES] = _formed_gradient(ctx, grad_loss)
            return tuple(nothing)
        kept = ctx.saved_tensors
        saved, tensors = list(kept[:5]), list(kept[5:])
        gradients = _gradients(grad_loss, saved, tensors, ctx.numbers, ctx.integers, ctx.line)
        for place, gradient in zip((_FEATURES, _PROTOTYPES, _BIAS, _TEMPERATURE), gradients, strict=True):
            if place < len(tensors) and ctx.needs_input_grad[place]:
                nothing[place] = gradient.to(tensors[place].dtype)
        return tuple(nothing)


_Recorded = dispatched.recordable(_Derivative)
_Transformed = dispatched.transformable(_Derivative, _OP)


# once more differentiated, it is refused; not in place, so that it can be
_scaled = dispatched.once(lambda dfeatures, grad_loss: (dfeatures * grad_loss).to(dfeatures.dtype), _OP)


def _formed_gradient(ctx, grad_loss: Tensor) -> Tensor:
    """The gradient that the forward formed, scaled where it lies: it is the returned one, unless the graph is kept for another backward."""
    (dfeatures,) = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if (
            not dispatched.is_transformed()
        ):  # stands for the features, which were not saved: who differentiates it again is refused
            dfeatures = dfeatures.detach().requires_grad_()
        return _scaled(dfeatures, grad_loss)
    # the second is in no stub
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore[reportAttributeAccessIssue]
        dfeatures = dfeatures.clone()
    _scale(dfeatures, grad_loss, ctx.line)
    return dfeatures


def recorded(contrast: Contrast, backend: str) -> Tensor:
    """The loss, recorded for autograd where a gradient may be asked for."""
    # here, not in the op: what is traced must save what is run saves, and the backend decides
    small = backends.is_small(contrast.features.numel())
    differentiable = (contrast.features, contrast.prototypes, contrast.bias, contrast.temperature)
    if dispatched.is_transformed():
        wanted = Wanted(*(isinstance(tensor, Tensor) for tensor in differentiable))
        packed = _pack(contrast, wanted, backend, small)
        return _Transformed.apply(*packed.tensors, packed.numbers, packed.integers, packed.line)[0]
    if not torch.is_grad_enabled():
        return _run_forward(*_pack(contrast, Wanted(), backend, small))[0]
    wanted = Wanted(*[isinstance(tensor, Tensor) and tensor.requires_grad for tensor in differentiable])
    packed = _pack(contrast, wanted, backend, small)
    if any(wanted):
        return _Recorded.apply(*packed.tensors, packed.numbers, packed.integers, packed.line)[0]
    return _run_forward(*packed)[0]
