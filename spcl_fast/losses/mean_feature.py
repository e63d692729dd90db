"""The mean (unit) feature of the labelled pixels, differentiable, without a copy of the features."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import checks, dispatched
from ..ops.labels import labels_on
from ..ops.pixels import labels_of, pixels_of


def mean_feature(features: Tensor, labels: Tensor, *, normalize: bool = True, ignore_index: int = 255) -> Tensor:
    """features [B, D, h, w] or [N, D]; labels [B, H, W] or [N], integer -> [D] float32 (float64 for float64 features).

        m = mean over labelled pixels of x/|x|,   0 where nothing is labelled

    normalize=False: of x itself. Differentiable once, in `features`. Raises as `class_moments`.
    Memory: the features are read once forward; the backward writes the gradient, with normalize=True two maps of a value per pixel.
    """
    pixels = pixels_of("mean_feature", features)
    labels = labels_on(labels_of("mean_feature", pixels, labels), pixels.features.shape[2:])
    return _recorded(pixels.features, labels != ignore_index, normalize)


class _MeanFeature:
    @staticmethod
    def compute(features: Tensor, labelled: Tensor, normalize: bool) -> Tensor:
        if features.dtype == torch.float64:  # sums of the op are float32
            rows = torch.nn.functional.normalize(features, dim=1) if normalize else features
            return rows.where(labelled[:, None], 0).sum((0, 2, 3)) / labelled.sum().clamp_min(1)
        found = ops.class_moments(features, (~labelled).to(torch.uint8), 1, normalize=normalize, ignore_index=1)
        return found.sums[0] / found.counts[0].clamp_min(1)

    @staticmethod
    def keep(ctx, inputs, output):
        features, labelled, ctx.normalize = inputs
        ctx.save_for_backward(features, labelled)

    @staticmethod
    def backward(ctx, grad: Tensor):
        features, labelled = ctx.saved_tensors
        share = labelled.to(grad.dtype) / labelled.sum().clamp_min(1)
        along = grad[None, :, None, None]
        if not ctx.normalize:
            return (share[:, None] * along).to(features.dtype), None, None
        norm = torch.linalg.vector_norm(features, dim=1, dtype=checks.wide(features))
        scale = share / norm.clamp_min(1e-12)
        cosine = ops.prototype_logits(features.detach(), grad[None], temperature=1.0)[:, 0]
        inward = (cosine * scale / norm).where(norm > 1e-12, 0)  # F.normalize: below its eps the norm is a constant
        found = features * -inward[:, None].to(features.dtype)
        return found.addcmul_(scale[:, None].to(found.dtype), along.to(found.dtype)), None, None


_recorded = dispatched.recorded_once(_MeanFeature, "mean_feature")
