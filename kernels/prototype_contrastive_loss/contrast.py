"""prototype_contrastive_loss: which kernels run, on which operands. A problem is any struct with the fields of the backends' `Contrast`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import launch
from ..operands import Incoming, LossPointers, SavedPointers, Target, incoming, weights_of
from ..pixels import architecture, layout, on_device_of, power_of_two, precision, reduce_partial
from .backward import backward_resident_kernel, backward_split_kernel, backward_tile_kernel
from .forward import forward_kernel, forward_resident_kernel
from .forward_targets import target_forward_kernel
from .pool import given_rows, pooled_logits
from .problem import (
    LSE_DTYPE,
    FeatureMap,
    features_of,
    holds_tile,
    is_wide,
    prototypes_of,
    saves_logits,
    sizes_of,
    target_of,
)
from .prototypes import cut_to, prototype_gradient
from .targets import target_pixels_kernel


def contrast_forward(contrast, wanted, flag, bad_probability: int):
    """-> loss, denominator, lse [B, P], inv_norm [B, P], logits [B, M, P]; the last three of shape [0] where not saved."""
    features = contrast.features
    batch, _, height, width = features.shape
    pixels, none, save = height * width, contrast.reduction == "none", any(wanted)
    rows = contrast.prototypes.shape[-2]
    loss = features.new_empty((batch, height, width) if none else (), dtype=torch.float32)
    denominator = torch.empty_like(loss) if not none else torch.ones((), dtype=torch.float32, device=features.device)
    lse = features.new_empty((batch, pixels) if save else 0, dtype=LSE_DTYPE)
    inv_norm = torch.empty_like(lse, dtype=torch.float32)
    logits = features.new_empty((batch, rows, pixels) if save and saves_logits(contrast) else 0, dtype=torch.float32)
    if batch * pixels == 0:
        return loss.zero_(), denominator.fill_(float(contrast.reduction != "mean")), lse, inv_norm, logits
    saved = SavedPointers(*((lse, inv_norm) if save else (None, None)), logits if logits.numel() else None)
    with on_device_of(features):
        if contrast.prototype_class is None:
            partial = _launch(contrast, flag, bad_probability, loss if none else None, saved, None)
        else:
            class_logits = pooled_logits(contrast, saved)
            kept = saved._replace(inv_norm=None, logits=None)  # both are the rows'
            partial = _launch(contrast, flag, bad_probability, loss if none else None, kept, class_logits)
        if not none:
            reduce_partial(partial, loss, denominator, contrast.reduction, contrast.denominator)
    return loss, denominator, lse, inv_norm, logits


def _launch(contrast, flag, bad_probability: int, loss_map, saved: SavedPointers, class_logits):
    """-> partial sums, or None where a map is asked for."""
    features = contrast.features
    target = target_of(contrast, flag, bad_probability)
    size = sizes_of(features, contrast.num_classes)
    variances = contrast.variances is not None
    resident = (
        target.plain is not None
        and class_logits is None
        and saved.logits is None
        and not variances
        and holds_tile(features)
    )
    kind = "_target" if target.plain is None or class_logits is not None else "_resident" if resident else ""
    name = "contrast_forward" + ("_variances" if variances and class_logits is None else kind)
    name = "contrast_forward_teacher" if is_wide(target) else name
    settings = launch.settings_of(architecture(features), name, features.dtype, size.D, size.K, layout(features))
    programs = features.shape[0] * triton.cdiv(size.P, settings["BLOCK_N"])
    partial = None if loss_map is not None else features.new_empty(2, programs, dtype=torch.float32)
    operands = (
        size, features_of(features), target, prototypes_of(contrast), weights_of(contrast.class_weight, contrast.pixel_weight), saved,
        LossPointers(loss_map, partial),
    )  # fmt: skip
    if resident:
        settings = settings | {"BLOCK_D": max(16, power_of_two(size.D))}
        forward_resident_kernel[(programs,)](*operands, contrast.normalize, **settings)
    elif target.plain is not None and class_logits is None:
        forward_kernel[(programs,)](*operands, contrast.normalize, precision(features.dtype), **settings)
    else:
        target_forward_kernel[(programs,)](
            *operands, class_logits, contrast.normalize, precision(features.dtype), **settings
        )
    return partial


def contrast_backward(grad_loss: Tensor, contrast, saved, wanted, flag: Tensor, bad_probability: int):
    """-> dfeatures, dprototypes, dbias, dtemperature; of shape [0] where not wanted. saved: what `contrast_forward` returned, by name."""
    features = contrast.features
    if features.shape[0] * features.shape[2] * features.shape[3] == 0:
        return no_gradients(contrast, wanted)
    target = target_of(contrast, flag, bad_probability)
    weights = weights_of(contrast.class_weight, contrast.pixel_weight)
    grad = incoming(grad_loss, saved.denominator)
    kept = SavedPointers(saved.lse, saved.inv_norm, saved.logits if saved.logits.numel() else None)
    if target.plain is None or contrast.prototype_class is not None:
        target = _with_pixels(grad, contrast, target._replace(plain=None), weights)
    if contrast.prototype_class is None:
        return gradients(contrast, grad, target, weights, kept, wanted)
    with on_device_of(features):
        target, of_margin = given_rows(contrast, target, weights, kept, wanted)
    kept = SavedPointers(None, saved.inv_norm, dots_alone(contrast, saved.logits))
    *parts, dtemperature = gradients(contrast._replace(margin=0.0), grad, target, weights, kept, wanted)
    if of_margin is not None:
        dtemperature = dtemperature + of_margin.sum(dtype=torch.float64).float()
    return *parts, dtemperature


def dots_alone(problem, row_logits: Tensor) -> Tensor | None:
    """Logits of rows where they are what a backward takes for the dots; None: they hold a bias or a variance term, and the dots are
    computed again, since taken out of a larger sum they would have lost their digits."""
    return row_logits if problem.variances is None and problem.bias is None else None


def _with_pixels(grad: Incoming, contrast, target: Target, weights) -> Target:
    """The target with each pixel's scale and mass."""
    features = contrast.features
    size = sizes_of(features, contrast.num_classes)
    scale = features.new_empty(features.shape[0], size.P, dtype=torch.float32)
    mass = torch.empty_like(scale)
    row = "contrast_forward_teacher" if is_wide(target) else "contrast_forward_target"
    settings = launch.settings_of(architecture(features), row, features.dtype, size.D, size.K, layout(features))
    programs = features.shape[0] * triton.cdiv(size.P, settings["BLOCK_N"])
    with on_device_of(features):
        target_pixels_kernel[(programs,)](
            grad, target, weights, scale, mass, size, precision(features.dtype), **settings
        )
    return target._replace(scale=scale, mass=mass)


def no_gradients(problem, wanted):
    """Of no pixels."""
    tensors = (problem.features, problem.prototypes, problem.bias, torch.empty(()))
    return tuple(
        torch.zeros(tensor.shape if asked else 0, dtype=dtype, device=problem.features.device)
        for tensor, asked, dtype in zip(tensors, wanted, (problem.features.dtype, *[torch.float32] * 3), strict=True)
    )


def gradients(problem, grad: Incoming | None, target: Target, weights, saved: SavedPointers, wanted):
    """The gradients of features, prototypes, bias and temperature, from any target."""
    features = problem.features
    prototypes, size = prototypes_of(problem), sizes_of(features, problem.prototypes.shape[-2])
    operands = (grad, target, prototypes, weights, saved, size)
    dfeatures = features.new_empty(0)
    dprototypes, dbias, dtemperature = (features.new_empty(0, dtype=torch.float32) for _ in range(3))
    with on_device_of(features):
        if wanted.features or wanted.temperature:
            dfeatures, dtemperature = _feature_gradient(problem, operands, wanted)
        if wanted.prototypes or wanted.bias:
            per_image = prototypes.stride_b is not None or prototypes.bias_b is not None
            sums, bias_sums = prototype_gradient(features, operands, per_image, wanted.bias)
            if wanted.prototypes:
                dprototypes = sums.sum(0) if per_image and prototypes.stride_b is None else sums
            if wanted.bias:
                assert bias_sums is not None
                dbias = bias_sums.sum(0) if per_image and prototypes.bias_b is None else bias_sums
    return dfeatures, dprototypes, dbias, dtemperature


def form_of(features: Tensor, num_classes: int, simple: bool, has_logits: bool) -> tuple[str, dict[str, int]]:
    """Which of the backward's three kernels (the third in three forms), and its settings.

    simple: a plain target, no variances, no gradient of the temperature."""
    dim, dtype, arch = features.shape[1], features.dtype, architecture(features)
    if simple and holds_tile(features) and not has_logits:
        settings = launch.settings_of(arch, "contrast_backward_resident", dtype, dim, num_classes, layout(features))
        return "resident", settings | {"BLOCK_D": max(16, power_of_two(dim))}
    settings = launch.find(arch, "contrast_backward_tile", dtype, dim, num_classes, layout(features))
    if simple and settings is not None and num_classes <= settings["BLOCK_K"]:
        return "tile", settings
    form = "target" if not simple else "split_saved" if has_logits else "split"
    settings = launch.settings_of(arch, f"contrast_backward_{form}", dtype, dim, num_classes, layout(features))
    return form, cut_to(settings, dim)


def _feature_gradient(problem, operands, wanted):
    """-> dfeatures, dtemperature []; of shape [0] where not wanted."""
    features = problem.features
    grad, target, prototypes, weights, saved, size = operands
    simple = target.plain is not None and prototypes.variances is None and not wanted.temperature
    form, settings = form_of(features, size.K, simple, saved.logits is not None)
    tiles = features.shape[0] * triton.cdiv(size.P, settings["BLOCK_N"])
    dfeatures = torch.empty_like(features) if wanted.features else features.new_empty(0)
    place = features_of(dfeatures) if wanted.features else FeatureMap(0, None, 0, 0, 0)
    inputs = (size, features_of(features), target, prototypes, weights, saved, place, grad)
    if form == "resident":
        backward_resident_kernel[(tiles,)](*inputs, problem.normalize, **settings)
    elif form == "tile":
        backward_tile_kernel[(tiles,)](*inputs, problem.normalize, precision(features.dtype), **settings)
    else:
        blocks = triton.cdiv(size.D, settings["BLOCK_O"]) if wanted.features else 1
        partial = features.new_empty(tiles, dtype=torch.float32) if wanted.temperature else None
        backward_split_kernel[(tiles, blocks)](
            *inputs, partial, problem.normalize, precision(features.dtype), **settings
        )
        if partial is not None:
            return dfeatures, partial.sum(dtype=torch.float64).float()
    return dfeatures, features.new_empty(0, dtype=torch.float32)
