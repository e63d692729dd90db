"""The losses of up-sampled logits through torch's dispatcher and autograd: what is traced, saved and differentiated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, UpsampledLoss
from . import checks, dispatched

_OPS = ("upsampled_cross_entropy", "upsampled_binary_cross_entropy")


# ---- the struct through the dispatcher --------------------------------------------------------------------------------


def _pack(
    op: str, problem: UpsampledLoss, backend: str, wanted: bool
) -> tuple[list[Tensor | None], list[float], list[int], str]:
    p = problem
    height, width = p.output_size
    small = backends.is_small(p.logits.shape[0] * height * width * p.logits.shape[1])
    line = dispatched.line(
        op, p.reduction, "align_corners" if p.align_corners else "", "small" if small else "", f"@{backend}" if backend else "",
        "dlogits" if wanted else "",
    )  # fmt: skip
    tensors = [p.logits, p.labels, p.class_weight, p.pixel_weight]
    if p.denominator is not None:
        tensors.append(p.denominator)
    return tensors, [p.temperature, p.label_smoothing, p.gamma], [p.ignore_index, *(p.size or ())], line


def _unpack(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], integers: Sequence[int], line: str
) -> UpsampledLoss:
    logits, labels, class_weight, pixel_weight, *denominator = tensors
    assert logits is not None and labels is not None
    temperature, smoothing, gamma = numbers
    ignore_index, *size = integers
    return UpsampledLoss(
        logits, labels, class_weight, pixel_weight, temperature, "align_corners" in dispatched.words(line), ignore_index,
        dispatched.one_of(line, "mean", "sum", "none"), smoothing, denominator[0] if denominator else None, gamma,
        (size[0], size[1]) if size else None,
    )  # fmt: skip


def _needs(problem: UpsampledLoss) -> frozenset[str]:
    used = {
        "probabilities": problem.labels.is_floating_point(),
        "label_smoothing": problem.label_smoothing > 0,
        "denominator": problem.denominator is not None,
        "focal": problem.gamma > 0,
    }
    return frozenset(name for name, is_used in used.items() if is_used)


def _forms_dlogits(line: str) -> bool:
    """A map's incoming gradient is another for each pixel: nothing can be formed before it is known."""
    words = dispatched.words(line)
    return "dlogits" in words and "none" not in words


@torch.library.custom_op("spcl_fast::upsampled_cross_entropy", mutates_args=())
def _forward(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], integers: Sequence[int], line: str
) -> tuple[Tensor, Tensor]:
    """Either loss: the line says which."""
    problem, op = _unpack(tensors, numbers, integers, line), dispatched.one_of(line, *_OPS)
    classes = problem.logits.shape[1]
    small = "small" in dispatched.words(line)
    ask = Ask(op, problem.logits.device, problem.logits.dtype, classes, classes, small, _needs(problem))
    used = backends.choose(ask, dispatched.named_backend(line))
    loss = used.upsampled_cross_entropy if op == _OPS[0] else used.upsampled_binary_cross_entropy
    return loss(problem, _forms_dlogits(line))


@_forward.register_fake
def _(tensors, numbers, integers, line):
    problem = _unpack(tensors, numbers, integers, line)
    logits = problem.logits
    shape = (logits.shape[0], *problem.output_size) if problem.reduction == "none" else ()
    loss = logits.new_empty(shape, dtype=checks.wide(logits))
    return loss, logits.new_empty(logits.shape if _forms_dlogits(line) else (0,), dtype=checks.wide(logits))


@torch.library.custom_op("spcl_fast::upsampled_cross_entropy_gradient", mutates_args=())
def _gradient(logits: Tensor, dlogits: Tensor) -> Tensor:
    """The gradient in the logits' dtype, as an op of its own so that differentiating it again is refused with a reason."""
    return dlogits.to(logits.dtype, copy=True)


@_gradient.register_fake
def _(logits, dlogits):
    return dlogits.new_empty(dlogits.shape, dtype=logits.dtype)


for _op in (_forward, _gradient):
    _op.register_vmap(dispatched.looped_over_batch(_op))

# ---- autograd ---------------------------------------------------------------------------------------------------------


_run_forward = dispatched.direct(_forward)
_converted = dispatched.once(dispatched.direct(_gradient), "the loss of up-sampled logits")


class _Derivative:
    """apply(*tensors, numbers, integers, line) -> what `_forward` returns; the loss alone is differentiable, in the logits."""

    @staticmethod
    def compute(*inputs):
        *tensors, numbers, integers, line = inputs
        return _run_forward(tensors, numbers, integers, line)

    @staticmethod
    def keep(ctx, inputs, output):
        *tensors, ctx.numbers, ctx.integers, ctx.line = inputs
        _, dlogits = output
        ctx.mark_non_differentiable(dlogits)
        ctx.set_materialize_grads(False)
        ctx.is_map = dlogits.dim() == 1
        if ctx.is_map:
            ctx.save_for_backward(*tensors)
        else:
            ctx.save_for_backward(tensors[0], dlogits)

    @staticmethod
    def backward(ctx, grad_loss, _):
        nothing = [None] * len(ctx.needs_input_grad)
        if grad_loss is None:
            return tuple(nothing)
        if ctx.is_map:  # the gradient of sum(map * grad) is that of the summed loss with the grad as pixel weights
            logits, labels, class_weight, pixel_weight, *_ = ctx.saved_tensors
            weight = grad_loss if pixel_weight is None else grad_loss * pixel_weight
            tensors = [logits.detach(), labels, class_weight, weight]
            dlogits = _run_forward(tensors, ctx.numbers, ctx.integers, ctx.line.replace(" none", " sum"))[1]
        else:
            logits, dlogits = ctx.saved_tensors
            dlogits = dlogits * grad_loss
        nothing[0] = _converted(logits, dlogits)
        return tuple(nothing)


_Recorded = dispatched.recordable(_Derivative)
_Transformed = dispatched.transformable(_Derivative, _OPS[0])


def recorded(op: str, problem: UpsampledLoss, backend: str) -> Tensor:
    """The loss, recorded for autograd where a gradient may be asked for."""
    transformed = dispatched.is_transformed()
    wanted = transformed or (torch.is_grad_enabled() and problem.logits.requires_grad)
    tensors, numbers, integers, line = _pack(op, problem, backend, wanted)
    if wanted:
        return (_Transformed if transformed else _Recorded).apply(*tensors, numbers, integers, line)[0]
    return _run_forward(tensors, numbers, integers, line)[0]
