"""upsampled_cross_entropy: cross-entropy of bilinearly up-sampled logits, without the up-sampled logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, UpsampledLoss
from . import checks, dispatched

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
    wide = _wide(logits)
    class_weight = None if class_weight is None else class_weight.to(wide)
    pixel_weight = None if pixel_weight is None else pixel_weight.to(wide)
    problem = UpsampledLoss(
        logits, labels, class_weight, pixel_weight, float(temperature), align_corners, ignore_index, reduction
    )
    return _recorded(problem, backend or "")


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# ---- the struct through the dispatcher --------------------------------------------------------------------------------


def _pack(
    problem: UpsampledLoss, backend: str, wanted: bool
) -> tuple[list[Tensor | None], list[float], list[int], str]:
    p = problem
    small = backends.is_small(p.labels.numel() * p.logits.shape[1])
    line = dispatched.line(
        p.reduction, "align_corners" if p.align_corners else "", "small" if small else "", f"@{backend}" if backend else "",
        "dlogits" if wanted else "",
    )  # fmt: skip
    return [p.logits, p.labels, p.class_weight, p.pixel_weight], [p.temperature], [p.ignore_index], line


def _unpack(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], integers: Sequence[int], line: str
) -> UpsampledLoss:
    reduction = dispatched.one_of(line, "mean", "sum", "none")
    return UpsampledLoss(*tensors, numbers[0], "align_corners" in dispatched.words(line), integers[0], reduction)


def _forms_dlogits(line: str) -> bool:
    """A map's incoming gradient is another for each pixel: nothing can be formed before it is known."""
    words = dispatched.words(line)
    return "dlogits" in words and "none" not in words


@torch.library.custom_op("spcl_fast::upsampled_cross_entropy", mutates_args=())
def _forward(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], integers: Sequence[int], line: str
) -> tuple[Tensor, Tensor]:
    problem = _unpack(tensors, numbers, integers, line)
    classes = problem.logits.shape[1]
    small = "small" in dispatched.words(line)
    ask = Ask(_OP, problem.logits.device, problem.logits.dtype, classes, classes, small)
    used = backends.choose(ask, dispatched.named_backend(line))
    return used.upsampled_cross_entropy(problem, _forms_dlogits(line))


@_forward.register_fake
def _(tensors, numbers, integers, line):
    problem = _unpack(tensors, numbers, integers, line)
    logits = problem.logits
    loss = logits.new_empty(problem.labels.shape if problem.reduction == "none" else (), dtype=_wide(logits))
    return loss, logits.new_empty(logits.shape if _forms_dlogits(line) else (0,), dtype=_wide(logits))


@torch.library.custom_op("spcl_fast::upsampled_cross_entropy_gradient", mutates_args=())
def _gradient(logits: Tensor, dlogits: Tensor) -> Tensor:
    """The gradient in the logits' dtype, as an op of its own so that differentiating it again is refused with a reason."""
    return dlogits.to(logits.dtype, copy=True)


@_gradient.register_fake
def _(logits, dlogits):
    return dlogits.new_empty(dlogits.shape, dtype=logits.dtype)


# ---- autograd ---------------------------------------------------------------------------------------------------------


class _Recorded(torch.autograd.Function):
    """apply(*tensors, numbers, integers, line) -> what `_forward` returns; the loss alone is differentiable, in the logits."""

    @staticmethod
    def forward(*inputs):
        *tensors, numbers, integers, line = inputs
        return _forward(tensors, numbers, integers, line)

    @staticmethod
    def setup_context(ctx, inputs, output):
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
            logits, labels, class_weight, pixel_weight = ctx.saved_tensors
            weight = grad_loss if pixel_weight is None else grad_loss * pixel_weight
            tensors = [logits.detach(), labels, class_weight, weight]
            dlogits = _forward(tensors, ctx.numbers, ctx.integers, ctx.line.replace("none", "sum"))[1]
        else:
            logits, dlogits = ctx.saved_tensors
            dlogits = dlogits * grad_loss
        nothing[0] = _gradient(logits, dlogits)
        return tuple(nothing)


_Transformed = dispatched.transformable(_Recorded, _OP)


def _recorded(problem: UpsampledLoss, backend: str) -> Tensor:
    """The loss, recorded for autograd where a gradient may be asked for."""
    transformed = dispatched.is_transformed()
    wanted = transformed or (torch.is_grad_enabled() and problem.logits.requires_grad)
    tensors, numbers, integers, line = _pack(problem, backend, wanted)
    if wanted:
        return (_Transformed if transformed else _Recorded).apply(*tensors, numbers, integers, line)[0]
    return _forward(tensors, numbers, integers, line)[0]


dispatched.register(_forward, _gradient, _OP)
