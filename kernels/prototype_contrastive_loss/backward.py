"""prototype_contrastive_loss, gradient of the features.

    dx = inv * s * ( sum_k w_k P_k / tau - c * inv * x ),   w_k = p_k - [k = label],   c = sum_k w_k z_k

c is a by-product of the softmax: the normalisation costs no pass over D. The pixel's scale s is taken out of the dot: w is in [-1, 1]
whatever the loss scale, and half floats lose nothing to underflow. c is formed from the rounded w, so that dx stays orthogonal to x.
Floor: feat read once, dfeat written once (2 S), 12 bytes a pixel of saves, 4 K more where the logits were saved; 2 to 4 N D K operations.
Three forms: the pixel tile resident (half floats, D <= 512, any K); all K in one tile, D in steps (K <= 64); both in steps.
Shapes: feat, dfeat [B, D, P] any strides; proto [K, D] contiguous, in feat's dtype; lse, inv_norm [B, P]; logits [B, K, P].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import launch as settings
from ..pixels import (
    architecture,
    class_and_pixel_weight,
    flag,
    is_flat,
    label_arguments,
    layout,
    on_device_of,
    pixel_offset,
    power_of_two,
    precision,
    read_class,
)
from .forward import RESIDENT_DIM, dots, softmax_of
from .prototypes import prototype_gradient


@triton.jit
def pixel_scale(
    grad_ptr, denominator_ptr, class_weight_ptr, pixel_weight_ptr, b, n, P, w, cls, bad, grad_b, grad_h, grad_w
):
    """s = grad_loss * class weight * pixel weight / denominator; exactly 0 where unlabelled, NaN at a bad label."""
    i = n // w
    offs = b * grad_b + i.to(tl.int64) * grad_h + (n - i * w).to(tl.int64) * grad_w
    grad = tl.load(grad_ptr + offs, mask=cls >= 0, other=0.0)
    denominator = tl.load(denominator_ptr)
    class_weight, pixel_weight = class_and_pixel_weight(class_weight_ptr, pixel_weight_ptr, cls, b * P + n)
    s = class_weight * pixel_weight * grad.to(tl.float32)
    s = tl.where(denominator == 0, 0.0, s / tl.where(denominator == 0, 1.0, denominator))
    return tl.where(bad, float("nan"), tl.where(cls >= 0, s, 0.0))


@triton.jit
def weights_of(z, lse, offs_k, K, cls):
    """p_k - [k = label] -> [BLOCK_N, BLOCK_K], 0 beyond K."""
    p = softmax_of(z, lse)
    return tl.where((offs_k < K)[None, :], tl.where(offs_k[None, :] == cls[:, None], p - 1.0, p), 0.0)


@triton.jit
def _gradient(out, x, s, inv, c, cls, bad, inv_temperature, RADIAL: tl.constexpr):
    """out = sum_k w_k P_k -> dx. Where nothing is labelled: 0, whatever x holds."""
    out = out * inv_temperature
    if RADIAL:
        radial = tl.where(inv < 9.9e11, c * inv, 0.0)  # a clamped norm is a constant
        out = out - radial[:, None] * x.to(tl.float32)
    return tl.where((cls >= 0)[:, None] | bad[:, None], out * (inv * s)[:, None], 0.0)


@triton.jit
def backward_resident_kernel(
    grad_ptr, feat_ptr, label_ptr, proto_ptr, class_weight_ptr, pixel_weight_ptr, lse_ptr, inv_ptr, denominator_ptr, dfeat_ptr, flag_ptr,
    P, D, K, w, H, W, scale_h, scale_w, label_b, label_h, label_w, ignore_index,
    stride_b, stride_d, stride_h, stride_w, out_b, out_d, out_h, out_w, grad_b, grad_h, grad_w, inv_temperature,
    NORMALIZE: tl.constexpr, FLAT: tl.constexpr, OUT_FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(P, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < P
    cls, bad = read_class(
        label_ptr, flag_ptr, b, n, mask_n, w, H, W, scale_h, scale_w, label_b, label_h, label_w, ignore_index, K
    )
    s = pixel_scale(
        grad_ptr, denominator_ptr, class_weight_ptr, pixel_weight_ptr, b, n, P, w, cls, bad, grad_b, grad_h, grad_w
    )
    lse = tl.load(lse_ptr + b * P + n, mask=mask_n, other=0.0).to(
        tl.float32
    )  # half floats round the weights far more; it saves registers
    inv = tl.load(inv_ptr + b * P + n, mask=mask_n, other=0.0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_n = pixel_offset(n, w, stride_h, stride_w, FLAT)
    x = tl.load(feat_ptr + b * stride_b + offs_n[:, None] + offs_d[None, :].to(tl.int64) * stride_d,
                mask=mask_n[:, None] & mask_d[None, :], other=0.0)  # fmt: skip
    out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    c = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        p = tl.load(
            proto_ptr + offs_k[:, None].to(tl.int64) * D + offs_d[None, :],
            mask=(offs_k < K)[:, None] & mask_d[None, :],
            other=0.0,
        )
        z = tl.dot(x, tl.trans(p)) * (inv * inv_temperature)[:, None]
        weight = weights_of(z, lse, offs_k, K, cls).to(x.dtype)
        c += tl.sum(weight.to(tl.float32) * z, 1)
        out = tl.dot(weight, p, out)
    dx = _gradient(out, x, s, inv, c, cls, bad, inv_temperature, NORMALIZE)
    offs_n = pixel_offset(n, w, out_h, out_w, OUT_FLAT)
    tl.store(dfeat_ptr + b * out_b + offs_n[:, None] + offs_d[None, :].to(tl.int64) * out_d,
             dx.to(x.dtype), mask=mask_n[:, None] & mask_d[None, :])  # fmt: skip


@triton.jit
def backward_tile_kernel(
    grad_ptr, feat_ptr, label_ptr, proto_ptr, class_weight_ptr, pixel_weight_ptr, lse_ptr, inv_ptr, logits_ptr, denominator_ptr, dfeat_ptr,
    flag_ptr, P, D, K, w, H, W, scale_h, scale_w, label_b, label_h, label_w, ignore_index,
    stride_b, stride_d, stride_h, stride_w, out_b, out_d, out_h, out_w, grad_b, grad_h, grad_w, inv_temperature,
    NORMALIZE: tl.constexpr, FLAT: tl.constexpr, OUT_FLAT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """K <= BLOCK_K: the weights of a pixel are formed once, from saved or recomputed logits, and D is walked in steps."""
    tiles = tl.cdiv(P, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < P
    cls, bad = read_class(
        label_ptr, flag_ptr, b, n, mask_n, w, H, W, scale_h, scale_w, label_b, label_h, label_w, ignore_index, K
    )
    s = pixel_scale(
        grad_ptr, denominator_ptr, class_weight_ptr, pixel_weight_ptr, b, n, P, w, cls, bad, grad_b, grad_h, grad_w
    )
    lse = tl.load(lse_ptr + b * P + n, mask=mask_n, other=0.0)
    inv = tl.load(inv_ptr + b * P + n, mask=mask_n, other=0.0)
    offs_n = pixel_offset(n, w, stride_h, stride_w, FLAT)
    feat_ptr += b * stride_b
    offs_k = tl.arange(0, BLOCK_K)
    if logits_ptr is not None:
        z = tl.load(
            logits_ptr + (b * K + offs_k[None, :]) * P + n[:, None],
            mask=mask_n[:, None] & (offs_k < K)[None, :],
            other=0.0,
        )
    else:
        acc, _ = dots(
            feat_ptr, proto_ptr, offs_n, mask_n, 0, K, D, stride_d, BLOCK_N, BLOCK_K, BLOCK_D, False, PRECISION
        )
        z = acc * (inv * inv_temperature)[:, None]
    weight = weights_of(z, lse, offs_k, K, cls).to(proto_ptr.dtype.element_ty)
    c = tl.sum(weight.to(tl.float32) * z, 1)

    offs_d = tl.arange(0, BLOCK_O)
    out_n = pixel_offset(n, w, out_h, out_w, OUT_FLAT)
    feat_ptrs = feat_ptr + offs_n[:, None] + offs_d[None, :].to(tl.int64) * stride_d
    out_ptrs = dfeat_ptr + b * out_b + out_n[:, None] + offs_d[None, :].to(tl.int64) * out_d
    proto_ptrs = proto_ptr + offs_k[:, None].to(tl.int64) * D + offs_d[None, :]
    step = tl.full((), BLOCK_O, tl.int64) * stride_d
    out_step = tl.full((), BLOCK_O, tl.int64) * out_d
    for d in range(0, D, BLOCK_O):
        mask = mask_n[:, None] & (offs_d < D - d)[None, :]
        p = tl.load(proto_ptrs, mask=(offs_k < K)[:, None] & (offs_d < D - d)[None, :], other=0.0)
        x = p
        if NORMALIZE:
            x = tl.load(feat_ptrs, mask=mask, other=0.0)
        out = tl.dot(weight, p, input_precision=PRECISION)
        dx = _gradient(out, x, s, inv, c, cls, bad, inv_temperature, NORMALIZE)
        tl.store(out_ptrs, dx.to(dfeat_ptr.dtype.element_ty), mask=mask)
        feat_ptrs += step
        out_ptrs += out_step
        proto_ptrs += BLOCK_O


@triton.jit
def backward_split_kernel(
    grad_ptr, feat_ptr, label_ptr, proto_ptr, class_weight_ptr, pixel_weight_ptr, lse_ptr, inv_ptr, logits_ptr, denominator_ptr, dfeat_ptr,
    flag_ptr, P, D, K, w, H, W, scale_h, scale_w, label_b, label_h, label_w, ignore_index,
    stride_b, stride_d, stride_h, stride_w, out_b, out_d, out_h, out_w, grad_b, grad_h, grad_w, inv_temperature,
    NORMALIZE: tl.constexpr, FLAT: tl.constexpr, OUT_FLAT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Any K and D: a program owns BLOCK_O channels of its pixels' gradient and reads their logits, or computes them again, whole."""
    tiles = tl.cdiv(P, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < P
    cls, bad = read_class(
        label_ptr, flag_ptr, b, n, mask_n, w, H, W, scale_h, scale_w, label_b, label_h, label_w, ignore_index, K
    )
    s = pixel_scale(
        grad_ptr, denominator_ptr, class_weight_ptr, pixel_weight_ptr, b, n, P, w, cls, bad, grad_b, grad_h, grad_w
    )
    lse = tl.load(lse_ptr + b * P + n, mask=mask_n, other=0.0)
    inv = tl.load(inv_ptr + b * P + n, mask=mask_n, other=0.0)
    offs_n = pixel_offset(n, w, stride_h, stride_w, FLAT)
    feat_ptr += b * stride_b
    offs_d = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_d = offs_d < D
    out = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    c = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        if logits_ptr is not None:
            z = tl.load(
                logits_ptr + (b * K + offs_k[None, :]) * P + n[:, None],
                mask=mask_n[:, None] & (offs_k < K)[None, :],
                other=0.0,
            )
        else:
            acc, _ = dots(
                feat_ptr, proto_ptr, offs_n, mask_n, k0, K, D, stride_d, BLOCK_N, BLOCK_K, BLOCK_D, False, PRECISION
            )
            z = acc * (inv * inv_temperature)[:, None]
        weight = weights_of(z, lse, offs_k, K, cls).to(proto_ptr.dtype.element_ty)
        c += tl.sum(weight.to(tl.float32) * z, 1)
        p = tl.load(
            proto_ptr + offs_k[:, None].to(tl.int64) * D + offs_d[None, :],
            mask=(offs_k < K)[:, None] & mask_d[None, :],
            other=0.0,
        )
        out = tl.dot(weight, p, out, input_precision=PRECISION)
    mask = mask_n[:, None] & mask_d[None, :]
    x = tl.load(feat_ptr + offs_n[:, None] + offs_d[None, :].to(tl.int64) * stride_d, mask=mask, other=0.0)
    dx = _gradient(out, x, s, inv, c, cls, bad, inv_temperature, NORMALIZE)
    out_n = pixel_offset(n, w, out_h, out_w, OUT_FLAT)
    tl.store(
        dfeat_ptr + b * out_b + out_n[:, None] + offs_d[None, :].to(tl.int64) * out_d,
        dx.to(dfeat_ptr.dtype.element_ty),
        mask=mask,
    )


def _form(features, num_classes: int, has_logits: bool) -> tuple[str, dict[str, int]]:
    """Which of the three kernels, and its settings."""
    dim, dtype, arch = features.shape[1], features.dtype, architecture(features)
    if dtype != torch.float32 and dim <= RESIDENT_DIM and not has_logits:
        launch = settings.find(arch, "contrast_backward_resident", dtype, dim, num_classes, layout(features))
        return "resident", launch | {"BLOCK_D": max(16, power_of_two(dim))}
    launch = settings.find(arch, "contrast_backward_tile", dtype, dim, num_classes, layout(features))
    if launch is not None and num_classes <= launch["BLOCK_K"]:
        return "tile", launch
    return "split", settings.find(arch, "contrast_backward_split", dtype, dim, num_classes, layout(features))


def _feature_gradient(dfeatures, grad_loss, features, tensors, logits, numbers, settings_of_loss):
    num_classes, pixels = numbers[2], numbers[0]
    form, launch = _form(features, num_classes, logits is not None)
    tiles = features.shape[0] * triton.cdiv(pixels, launch["BLOCK_N"])
    lse, inv_norm, denominator = tensors[-3:]
    inputs = (grad_loss, *tensors[:-3], lse, inv_norm)
    grad_strides = grad_loss.stride() if grad_loss.dim() else (0, 0, 0)
    inv_temperature, normalize = settings_of_loss
    strides = (*numbers, *features.stride(), *dfeatures.stride(), *grad_strides, inv_temperature)
    flags = (normalize, is_flat(features), is_flat(dfeatures))
    outputs = (denominator, dfeatures, flag(features))
    if form == "resident":
        backward_resident_kernel[(tiles,)](*inputs, *outputs, *strides, *flags, **launch)
    elif form == "tile":
        backward_tile_kernel[(tiles,)](*inputs, logits, *outputs, *strides, *flags, precision(features.dtype), **launch)
    else:
        grid = (tiles, triton.cdiv(features.shape[1], launch["BLOCK_O"]))
        backward_split_kernel[grid](*inputs, logits, *outputs, *strides, *flags, precision(features.dtype), **launch)


def prototype_contrastive_backward(
    grad_loss, features, labels, prototypes, class_weight, pixel_weight, variances, lse, inv_norm, logits, denominator,
    *, temperature, normalize, ignore_index, reduction, needs_dfeatures, needs_dprototypes,
):  # fmt: skip
    """-> dfeatures (features' dtype and layout) or empty, dprototypes [K, D] float32 or empty. Contract: `backends/reference.py`."""
    batch, dim, height, width = features.shape
    num_classes = prototypes.shape[0]
    dfeatures = torch.empty_like(features) if needs_dfeatures else features.new_empty(0)
    dprototypes = features.new_empty(prototypes.shape if needs_dprototypes else 0, dtype=torch.float32)
    if batch * height * width == 0:
        return dfeatures, dprototypes.zero_()
    prototypes = prototypes.to(features.dtype).contiguous()
    pixel_weight = None if pixel_weight is None else pixel_weight.contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    tensors = (features, labels, prototypes, class_weight, pixel_weight, lse, inv_norm, denominator)
    numbers = (height * width, dim, num_classes, *label_arguments(labels, height, width, ignore_index))
    logits = logits if logits.numel() else None
    with on_device_of(features):
        if needs_dfeatures:
            _feature_gradient(dfeatures, grad_loss, features, tensors, logits, numbers, (1 / temperature, normalize))
        if needs_dprototypes:
            prototype_gradient(dprototypes, grad_loss, features, tensors, logits, numbers, 1 / temperature)
    return dfeatures, dprototypes
