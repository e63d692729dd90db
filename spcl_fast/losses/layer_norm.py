"""Scores of layer-normed unit features against rows of prototypes, from the features as they are: no normed copy of them is ever there.

    y = weight (x - mean) / sqrt(variance + eps) + bias,  mean and variance over the D channels of a pixel;  s_r = <y / |y|, row_r>

Pixels are taken in blocks that stay in the processor's cache, channels first as they come, so nothing is transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from .. import ops
from ..estimators.assignment import NONE
from ..ops import checks, dispatched

_BLOCK = 1 << 19  # values of features that are there at a time, a few times over: 2 MB
_EPS = 1e-12  # of F.normalize


def is_plain(norm: nn.Module, dim: int) -> TypeGuard[nn.LayerNorm]:
    """Whether the module is a LayerNorm over the channels, with weight and bias: what the functions here stand for."""
    return type(norm) is nn.LayerNorm and norm.normalized_shape == (dim,) and norm.bias is not None


def layer_normed_scores(features: Tensor, norm: nn.LayerNorm, rows: Tensor) -> Tensor:
    """F.normalize(norm(pixels)) @ rows.T: features [B, D, h, w], rows [R, D], constants -> [B h w, R] float32 (float64 of float64).

    Differentiable once, in the features and in norm's weight and bias. Memory: the scores, 12 bytes per pixel and the gradient.
    """
    return _scores(features, norm.weight, norm.bias, rows.detach(), norm.eps)[0]


@torch.no_grad()
def layer_normed_moments(features: Tensor, norm: nn.LayerNorm, labels: Tensor, num_classes: int) -> ops.ClassMoments:
    """class_moments of F.normalize(norm(pixels)): labels [B, h, w], NONE where there is none."""
    sums = features.new_zeros((num_classes, features.shape[1]), dtype=torch.float32)
    counts = labels.new_zeros(num_classes, dtype=torch.int64)
    for at in _blocks(features):
        y = _normed(_values(features, at), norm.weight, norm.bias, norm.eps).y
        own = labels[at.image, at.lines].reshape(1, -1, 1)
        found = ops.class_moments(y[None, :, :, None], own, num_classes, ignore_index=NONE)
        sums += found.sums
        counts += found.counts
    return ops.ClassMoments(sums, counts, None)


class _At(NamedTuple):
    image: int
    lines: slice
    pixels: slice  # of all pixels, in the order of images, lines and columns


class _Normed(NamedTuple):
    mean: Tensor  # [n]
    scale: Tensor  # [n]: 1 / sqrt(variance + eps)
    y: Tensor  # [D, n]


def _blocks(features: Tensor) -> Iterator[_At]:
    batch, dim, height, width = features.shape
    lines = max(1, _BLOCK // max(1, dim * width))
    for image in range(batch):
        for first in range(0, height, lines):
            last = min(first + lines, height)
            start = image * height
            yield _At(image, slice(first, last), slice((start + first) * width, (start + last) * width))


def _values(features: Tensor, at: _At) -> Tensor:
    """[D, n]."""
    return features[at.image, :, at.lines].flatten(1).to(checks.wide(features))


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> _Normed:
    mean = x.mean(0)
    y = x - mean
    scale = (y.square().sum(0) / len(x) + eps).rsqrt()
    y = torch.addcmul(bias.to(x.dtype)[:, None], y.mul_(scale), weight.to(x.dtype)[:, None])
    return _Normed(mean, scale, y)


class _Scores:
    """(scores [N, R], mean, scale and length [N])."""

    @staticmethod
    def compute(features: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, eps: float):
        count, kind = features.numel() // max(1, features.shape[1]), checks.wide(features)
        scores = features.new_empty((count, len(rows)), dtype=kind)
        mean, scale, length = (features.new_empty(count, dtype=kind) for _ in range(3))
        rows = rows.to(kind)
        for at in _blocks(features):
            mean[at.pixels], scale[at.pixels], y = _normed(_values(features, at), weight, bias, eps)
            long = y.square().sum(0).sqrt()  # vector_norm across rows takes four times as long
            length[at.pixels] = long
            scores[at.pixels] = (y.t() @ rows.t()).div_(long.clamp_min(_EPS)[:, None])
        return scores, mean, scale, length

    @staticmethod
    def keep(ctx, inputs, output):
        *tensors, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        features, weight, bias, rows, scores, mean, scale, length = ctx.saved_tensors
        kind, dim = scores.dtype, features.shape[1]
        wide, shift, rows = weight.to(kind)[:, None], bias.to(kind)[:, None], rows.to(kind)
        dfeatures = torch.empty_like(features) if ctx.needs_input_grad[0] else None
        dweight, dbias = torch.zeros_like(weight, dtype=kind), torch.zeros_like(bias, dtype=kind)
        for at in _blocks(features):
            own, long = scale[at.pixels], length[at.pixels]
            unit = (_values(features, at) - mean[at.pixels]).mul_(own)  # the standardised features
            slope = grad[at.pixels] / long.clamp_min(_EPS)[:, None]
            # a feature shorter than eps is divided by a constant
            along = ((grad[at.pixels] * scores[at.pixels]).sum(1) / long.square()).masked_fill(long <= _EPS, 0)
            dy = rows.t() @ slope.t()
            dy.sub_(torch.addcmul(shift, unit, wide).mul_(along))
            product = dy * unit
            dweight += product.sum(1)
            dbias += dy.sum(1)
            if dfeatures is not None:
                level, tilt = (torch.mv(values.t(), wide[:, 0]) / dim for values in (dy, product))
                dx = dy.mul_(wide).sub_(level).sub_(unit.mul_(tilt)).mul_(own)
                dfeatures[at.image, :, at.lines] = dx.view(dim, -1, features.shape[3]).to(features.dtype)
        return dfeatures, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


_scores = dispatched.recorded_once(_Scores, "layer_normed_scores")
