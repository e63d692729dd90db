"""prototype_logits: the logits of the contrast as a map, and their gradient back to features, prototypes, bias and temperature.

Memory: the rows' logits; of the backward the same again, and the incoming gradient's largest per pixel (half floats lose nothing to
underflow: a pixel's gradients are divided by it before the dots, and multiplied after them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import Given, SavedPointers, Target
from .pixels import on_device_of
from .prototype_contrastive_loss.contrast import dots_alone, gradients, no_gradients
from .prototype_contrastive_loss.pool import pool, row_logits, unpool


def logits_forward(problem) -> Tensor:
    """-> [B, K, h, w] float32. problem: as the backends' `Logits`."""
    features = problem.features
    batch, _, height, width = features.shape
    rows = features.new_empty((batch, problem.prototypes.shape[-2], height * width), dtype=torch.float32)
    if rows.numel() == 0:
        return rows.new_zeros(batch, problem.num_classes, height, width)
    with on_device_of(features):
        row_logits(problem, rows, None)
        if problem.prototype_class is not None:
            rows = pool(problem, rows)[0]
    return rows.view(batch, problem.num_classes, height, width)


def logits_backward(grad_logits: Tensor, problem, wanted):
    """-> dfeatures, dprototypes, dbias, dtemperature; of shape [0] where not wanted."""
    features = problem.features
    batch, _, height, width = features.shape
    if batch * height * width == 0:
        return no_gradients(problem, wanted)
    rows = features.new_empty((batch, problem.prototypes.shape[-2], height * width), dtype=torch.float32)
    inv_norm = features.new_empty((batch, height * width), dtype=torch.float32)
    grad = grad_logits.float().flatten(2).contiguous()
    scale = grad.abs().amax(1)
    with on_device_of(features):
        row_logits(problem, rows, inv_norm)
        if problem.prototype_class is not None:
            pooled, walk = pool(problem, rows)
            grad = unpool(problem, rows, pooled, walk, grad)
    target = Target(None, None, None, Given(grad, 1), 1.0, 0.0, None, None, None, scale=scale)
    saved = SavedPointers(None, inv_norm, dots_alone(problem, rows))
    return gradients(problem, None, target, None, saved, wanted)
