"""The similarity of each pixel to the prototype of its own label alone: one dot product per pixel instead of K."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..ops import checks, dispatched
from ..ops.pixels import labels_of, pixels_of

_BLOCK = 1 << 20  # values of gathered prototypes that are there at a time
_EPS = 1e-12  # of F.normalize


def labelled_similarity(
    features: Tensor,  # [B, D, h, w] or [N, D]
    labels: Tensor,  # [B, H, W] or [N], integer, any size
    prototypes: Tensor,  # [R, D]
    *,
    normalize: bool = True,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor]:  # similarity and whether a pixel has a label, both of the features' grid
    """s = <u, prototype_label>, u = x/|x| (x with normalize=False); 0 where a pixel has no label, and its gradient exactly 0.

    Differentiable once, in `features` and `prototypes`. float32 (float64 for float64 features).
    Raises ValueError or TypeError for what does not fit, on the CPU for a label outside [0, R), too; on a GPU such a pixel is NaN.
    Memory: the gradient, 8 bytes per pixel, and blocks of 4 MB.
    """
    name = "labelled_similarity"
    pixels = pixels_of(name, features)
    if prototypes.dim() != 2 or prototypes.shape[1] != pixels.features.shape[1]:
        raise ValueError(
            f"{name}: prototypes must be [R, D] with the features' D = {pixels.features.shape[1]}, got shape {list(prototypes.shape)}"
        )
    checks.check_device(name, pixels.features, "features", prototypes=prototypes)
    given = labels_of(name, pixels, labels)
    own = ops.labels_on(given, pixels.features.shape[2:]).long()
    own = ops.agreement_labels(
        given, own, num_classes=len(prototypes), ignore_index=ignore_index
    )  # checks what they are
    is_labelled = own != ignore_index
    is_bad = is_labelled & ((own < 0) | (own >= len(prototypes)))  # on a GPU, where the check does not wait
    own = own.masked_fill(~is_labelled | is_bad, -1)
    found, _ = _recorded(pixels.features, own, prototypes, normalize)
    return pixels.map(found.masked_fill(is_bad, torch.nan)), pixels.map(is_labelled)


class _LabelledSimilarity:
    """(similarity, norm of the features), both of the features' grid."""

    @staticmethod
    def compute(features: Tensor, own: Tensor, prototypes: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        wide = checks.wide(features)
        found = features.new_zeros(own.shape, dtype=wide)
        norm = features.new_ones(own.shape, dtype=wide)
        for image, lines in _blocks(features):
            x, target = _block(features, own, prototypes, image, lines, wide)
            dot = (x * target).sum(0)
            if normalize:
                norm[image, lines] = x.square().sum(0).sqrt()
                dot = dot / norm[image, lines].clamp_min(_EPS)
            found[image, lines] = dot.masked_fill(own[image, lines] < 0, 0)
        return found, norm

    @staticmethod
    def keep(ctx, inputs, output):
        *tensors, ctx.normalize = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        features, own, prototypes, found, norm = ctx.saved_tensors
        grad = grad.masked_fill(own < 0, 0)
        dfeatures = torch.empty_like(features if ctx.needs_input_grad[0] else features[:0])
        for image, lines in _blocks(dfeatures):
            x, target = _block(features, own, prototypes, image, lines, found.dtype)
            length = norm[image, lines].clamp_min(_EPS)
            if ctx.normalize:  # a feature shorter than eps is divided by a constant
                along = (found[image, lines] / length).masked_fill(norm[image, lines] <= _EPS, 0)
                target = (target - along * x) / length
            dfeatures[image, :, lines] = (grad[image, lines] * target).masked_fill(own[image, lines] < 0, 0).to(x.dtype)
        dprototypes = (
            _of_prototypes(ctx.normalize, features, own, prototypes, grad, norm) if ctx.needs_input_grad[2] else None
        )
        return dfeatures if ctx.needs_input_grad[0] else None, None, dprototypes, None


_recorded = dispatched.recorded_once(_LabelledSimilarity, "labelled_similarity")


def _blocks(features: Tensor) -> Iterator[tuple[int, slice]]:
    dim, height, width = features.shape[1:]
    lines = max(1, _BLOCK // max(1, dim * width))
    for image in range(len(features)):
        for first in range(0, height, lines):
            yield image, slice(first, first + lines)


def _block(features: Tensor, own: Tensor, prototypes: Tensor, image: int, lines: slice, dtype: torch.dtype):
    """[D, lines, w] of the features, and of each pixel's prototype."""
    target = prototypes.to(dtype)[own[image, lines].clamp_min(0)]
    return features[image, :, lines].to(dtype), target.movedim(-1, 0)


def _of_prototypes(
    normalize: bool, features: Tensor, own: Tensor, prototypes: Tensor, grad: Tensor, norm: Tensor
) -> Tensor:
    """Sum of grad u over the pixels of each label: a class_moments with weights, which has the same bits for any number of threads."""
    if features.dtype != torch.float64:
        moments = ops.class_moments(
            features, own, len(prototypes), normalize=normalize, ignore_index=-1, pixel_weight=grad
        )
        return moments.sums.to(prototypes.dtype)
    unit = features / norm[:, None].clamp_min(_EPS) if normalize else features
    rows = torch.where((own >= 0)[:, None], grad[:, None] * unit, 0).movedim(1, -1).flatten(0, 2)
    return torch.zeros_like(prototypes).index_add_(0, own.flatten().clamp_min(0), rows.to(prototypes.dtype))
