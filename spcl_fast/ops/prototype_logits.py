"""prototype_logits: the logits of prototype_contrastive_loss, for any loss on the small map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, Backend, Gradients, Logits, Wanted
from . import checks, dispatched
from .pixels import pixels_of
from .rows import Rows, check_rows

_OP = "prototype_logits"


def prototype_logits(
    features: Tensor,  # [B, D, h, w], [N, D], [B, D, L] or [B, D, T, h, w]
    prototypes: Tensor,  # [K, D] or [B, K, D]; with prototype_class [M, D] or [B, M, D]
    *,
    temperature: float | Tensor,
    normalize: bool = True,
    bias: Tensor | None = None,  # [K] or [B, K]
    variances: Tensor | None = None,  # the prototypes' shape
    prototype_class: Tensor | None = None,  # [M], any integer dtype
    pool: str = "logsumexp",
    backend: str | None = None,
    num_classes: int | None = None,
) -> Tensor:  # [B, K, h, w], [N, K], ...; float32 (float64 for float64 features)
    """z_k = <u, prototype_k> / temperature + 1/2 <u^2, variances_k> / temperature^2 + bias_k, u = x/|x|; pooled into classes as in
    `prototype_contrastive_loss`, whose arguments these are -> [B, K, h, w] or [N, K].

    Differentiable once, in `features`, `prototypes`, `bias` and `temperature`. With `upsampled_cross_entropy` this is a segmentation head
    (DenseCLIP and tqdm: text prototypes [B, K, D], temperature 0.07); a linear one has normalize=False, temperature=1 and a bias.
    Raises ValueError or TypeError for what does not fit. Memory: the map; nothing feature-sized but the gradient.
    """
    pixels = pixels_of(_OP, features)
    classes = check_rows(_OP, pixels, Rows(prototypes, variances, bias, prototype_class, pool, num_classes))
    temperature = checks.scale_of(_OP, pixels.features, temperature)
    checks.check_options(_OP, ignore_index=0, backend=backend, normalize=normalize)
    if not classes:
        raise ValueError(f"{_OP}: give num_classes where a graph is traced: the result's shape depends on it")
    of_row = None if prototype_class is None else prototype_class.long()
    problem = Logits(pixels.features, prototypes, variances, bias, temperature, normalize, of_row, pool, classes)
    return pixels.channels(_recorded(problem, backend or ""))


# ---- the struct through the dispatcher --------------------------------------------------------------------------------

_DIFFERENTIABLE = (0, 1, 3, 4)  # features, prototypes, bias and temperature in the list of tensors


def _pack(problem: Logits, wanted: Wanted, backend: str) -> tuple[list[Tensor | None], float, int, str]:
    p = problem
    temperature, number = (p.temperature, 1.0) if isinstance(p.temperature, Tensor) else (None, p.temperature)
    line = dispatched.line(
        p.pool, "normalize" if p.normalize else "", "small" if backends.is_small(p.features.numel()) else "",
        f"@{backend}" if backend else "", *(f"d{name}" for name, is_wanted in zip(Wanted._fields, wanted, strict=True) if is_wanted),
    )  # fmt: skip
    tensors = [p.features, p.prototypes, p.variances, p.bias, temperature, p.prototype_class]
    return tensors, number, p.classes, line


def _unpack(tensors: Sequence[Tensor | None], temperature: float, classes: int, line: str) -> Logits:
    features, prototypes, variances, bias, scale, of_row = tensors
    assert features is not None and prototypes is not None
    pool = dispatched.one_of(line, "logsumexp", "max")
    return Logits(
        features, prototypes, variances, bias, temperature if scale is None else scale, "normalize" in dispatched.words(line),
        of_row, pool, classes,
    )  # fmt: skip


def _wanted(line: str) -> Wanted:
    words = dispatched.words(line)
    return Wanted(*(f"d{name}" in words for name in Wanted._fields))


def _backend(problem: Logits, line: str) -> Backend:
    p, words = problem, dispatched.words(line)
    used = {
        "variances": p.variances is not None,
        "per_image_prototypes": p.prototypes.dim() == 3,
        "bias": p.bias is not None,
        "tensor_temperature": isinstance(p.temperature, Tensor),
        "prototype_class": p.prototype_class is not None,
        "dbias": "dbias" in words,
        "dtemperature": "dtemperature" in words,
    }
    needs = frozenset(name for name, is_used in used.items() if is_used)
    num_rows, dim = p.prototypes.shape[-2:]
    ask = Ask(_OP, p.features.device, p.features.dtype, num_rows, dim, "small" in words, needs)
    return backends.choose(ask, dispatched.named_backend(line))


@torch.library.custom_op("spcl_fast::prototype_logits", mutates_args=())
def _forward(tensors: Sequence[Tensor | None], temperature: float, classes: int, line: str) -> Tensor:
    problem = _unpack(tensors, temperature, classes, line)
    return _backend(problem, line).logits_forward(problem)


@_forward.register_fake
def _(tensors, temperature, classes, line):
    features = tensors[0]
    batch, _, height, width = features.shape
    return features.new_empty((batch, classes, height, width), dtype=checks.wide(features))


@torch.library.custom_op("spcl_fast::prototype_logits_backward", mutates_args=())
def _backward(
    grad_logits: Tensor, tensors: Sequence[Tensor | None], temperature: float, classes: int, line: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = _unpack(tensors, temperature, classes, line)
    return _backend(problem, line).logits_backward(grad_logits, problem, _wanted(line))


@_backward.register_fake
def _(grad_logits, tensors, temperature, classes, line):
    problem, wanted = _unpack(tensors, temperature, classes, line), _wanted(line)
    features, prototypes, wide = problem.features, problem.prototypes, checks.wide(problem.features)
    bias = problem.bias if wanted.bias else None
    return Gradients(
        torch.empty_like(features) if wanted.features else features.new_empty(0),
        prototypes.new_empty(prototypes.shape if wanted.prototypes else (0,), dtype=wide),
        prototypes.new_empty(0 if bias is None else bias.shape, dtype=wide),
        prototypes.new_empty(() if wanted.temperature else (0,), dtype=wide),
    )


for _op in (_forward, _backward):
    _op.register_vmap(dispatched.looped_over_batch(_op))

# ---- autograd ---------------------------------------------------------------------------------------------------------


_gradients = dispatched.once(_backward, _OP)


class _Derivative:
    """apply(*tensors, temperature, classes, line) -> logits."""

    @staticmethod
    def compute(*inputs):
        *tensors, temperature, classes, line = inputs
        return _forward(tensors, temperature, classes, line)

    @staticmethod
    def keep(ctx, inputs, output):
        *tensors, ctx.temperature, ctx.classes, ctx.line = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_logits):
        tensors, nothing = list(ctx.saved_tensors), [None] * len(ctx.needs_input_grad)
        gradients = _gradients(grad_logits, tensors, ctx.temperature, ctx.classes, ctx.line)
        for place, gradient in zip(_DIFFERENTIABLE, gradients, strict=True):
            if ctx.needs_input_grad[place]:
                nothing[place] = gradient.to(tensors[place].dtype)
        return tuple(nothing)


_Recorded = dispatched.recordable(_Derivative)
_Transformed = dispatched.transformable(_Derivative, _OP)


def _recorded(problem: Logits, backend: str) -> Tensor:
    differentiable = (problem.features, problem.prototypes, problem.bias, problem.temperature)
    if dispatched.is_transformed():
        wanted = Wanted(*(isinstance(tensor, Tensor) for tensor in differentiable))
        tensors, *rest = _pack(problem, wanted, backend)
        return _Transformed.apply(*tensors, *rest)
    is_recorded = torch.is_grad_enabled()
    wanted = Wanted(*[is_recorded and isinstance(tensor, Tensor) and tensor.requires_grad for tensor in differentiable])
    tensors, *rest = _pack(problem, wanted, backend)
    return _Recorded.apply(*tensors, *rest) if any(wanted) else _forward(tensors, *rest)
