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

from .. import launch
from ..operands import Prototypes, Saved, feature_map, incoming, labels_at, size_of, weights_of
from ..pixels import (
    architecture,
    flag,
    layout,
    on_device_of,
    pixel_offset,
    power_of_two,
    precision,
    read_class,
    read_weights,
    tile_of,
)
from .forward import RESIDENT_DIM, logits_again, softmax_of
from .prototypes import prototype_gradient


@triton.jit
def pixel_scale(grad, weights, b, n, size, cls, bad):
    """s = grad_loss * class weight * pixel weight / denominator; exactly 0 where unlabelled, NaN at a bad label."""
    i = n // size.w
    offs = b * grad.stride_b + i.to(tl.int64) * grad.stride_h + (n - i * size.w).to(tl.int64) * grad.stride_w
    given = tl.load(grad.ptr + offs, mask=cls >= 0, other=0.0)
    denominator = tl.load(grad.denominator)
    class_weight, pixel_weight = read_weights(weights, cls, b * size.P + n)
    s = class_weight * pixel_weight * given.to(tl.float32)
    s = tl.where(denominator == 0, 0.0, s / tl.where(denominator == 0, 1.0, denominator))
    return tl.where(bad, float("nan"), tl.where(cls >= 0, s, 0.0))


@triton.jit
def logit_weights(z, lse, offs_k, K, cls):
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
    grad, features, labels, prototypes, weights, saved, dfeatures, size,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_class(labels, b, n, mask_n, size)
    s = pixel_scale(grad, weights, b, n, size, cls, bad)
    # in float32: half floats round the weights far more, and it saves registers
    lse = tl.load(saved.lse + b * size.P + n, mask=mask_n, other=0.0).to(tl.float32)
    inv = tl.load(saved.inv_norm + b * size.P + n, mask=mask_n, other=0.0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < size.D
    mask = mask_n[:, None] & mask_d[None, :]
    offs_n = pixel_offset(features, n, size.w)
    feat_ptrs = (
        features.ptr + b * features.stride_b + offs_n[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d
    )
    x = tl.load(feat_ptrs, mask=mask, other=0.0)
    out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    c = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, size.K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        p = tl.load(
            prototypes.ptr + offs_k[:, None].to(tl.int64) * size.D + offs_d[None, :],
            mask=(offs_k < size.K)[:, None] & mask_d[None, :],
            other=0.0,
        )
        z = tl.dot(x, tl.trans(p)) * (inv * prototypes.inv_temperature)[:, None]
        weight = logit_weights(z, lse, offs_k, size.K, cls).to(x.dtype)
        c += tl.sum(weight.to(tl.float32) * z, 1)
        out = tl.dot(weight, p, out)
    dx = _gradient(out, x, s, inv, c, cls, bad, prototypes.inv_temperature, NORMALIZE)
    out_n = pixel_offset(dfeatures, n, size.w)
    out_ptrs = (
        dfeatures.ptr + b * dfeatures.stride_b + out_n[:, None] + offs_d[None, :].to(tl.int64) * dfeatures.stride_d
    )
    tl.store(out_ptrs, dx.to(x.dtype), mask=mask)


@triton.jit
def backward_tile_kernel(
    grad, features, labels, prototypes, weights, saved, dfeatures, size, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """K <= BLOCK_K: the weights of a pixel are formed once, from saved or recomputed logits, and D is walked in steps."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_class(labels, b, n, mask_n, size)
    s = pixel_scale(grad, weights, b, n, size, cls, bad)
    lse = tl.load(saved.lse + b * size.P + n, mask=mask_n, other=0.0)
    inv = tl.load(saved.inv_norm + b * size.P + n, mask=mask_n, other=0.0)
    offs_n = pixel_offset(features, n, size.w)
    image_ptr = features.ptr + b * features.stride_b
    offs_k = tl.arange(0, BLOCK_K)
    z = logits_again(
        image_ptr, features, prototypes, saved, b, n, offs_n, mask_n, inv, 0, size, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION
    )
    weight = logit_weights(z, lse, offs_k, size.K, cls).to(prototypes.ptr.dtype.element_ty)
    c = tl.sum(weight.to(tl.float32) * z, 1)

    offs_d = tl.arange(0, BLOCK_O)
    out_n = pixel_offset(dfeatures, n, size.w)
    feat_ptrs = image_ptr + offs_n[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d
    out_ptrs = (
        dfeatures.ptr + b * dfeatures.stride_b + out_n[:, None] + offs_d[None, :].to(tl.int64) * dfeatures.stride_d
    )
    proto_ptrs = prototypes.ptr + offs_k[:, None].to(tl.int64) * size.D + offs_d[None, :]
    step = tl.full((), BLOCK_O, tl.int64) * features.stride_d
    out_step = tl.full((), BLOCK_O, tl.int64) * dfeatures.stride_d
    for d in range(0, size.D, BLOCK_O):
        mask = mask_n[:, None] & (offs_d < size.D - d)[None, :]
        p = tl.load(proto_ptrs, mask=(offs_k < size.K)[:, None] & (offs_d < size.D - d)[None, :], other=0.0)
        x = p
        if NORMALIZE:
            x = tl.load(feat_ptrs, mask=mask, other=0.0)
        out = tl.dot(weight, p, input_precision=PRECISION)
        dx = _gradient(out, x, s, inv, c, cls, bad, prototypes.inv_temperature, NORMALIZE)
        tl.store(out_ptrs, dx.to(dfeatures.ptr.dtype.element_ty), mask=mask)
        feat_ptrs += step
        out_ptrs += out_step
        proto_ptrs += BLOCK_O


@triton.jit
def backward_split_kernel(
    grad, features, labels, prototypes, weights, saved, dfeatures, size, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Any K and D: a program owns BLOCK_O channels of its pixels' gradient and reads their logits, or computes them again, whole."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_class(labels, b, n, mask_n, size)
    s = pixel_scale(grad, weights, b, n, size, cls, bad)
    lse = tl.load(saved.lse + b * size.P + n, mask=mask_n, other=0.0)
    inv = tl.load(saved.inv_norm + b * size.P + n, mask=mask_n, other=0.0)
    offs_n = pixel_offset(features, n, size.w)
    image_ptr = features.ptr + b * features.stride_b
    offs_d = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_d = offs_d < size.D
    out = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    c = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, size.K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        z = logits_again(
            image_ptr,
            features,
            prototypes,
            saved,
            b,
            n,
            offs_n,
            mask_n,
            inv,
            k0,
            size,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
            PRECISION,
        )
        weight = logit_weights(z, lse, offs_k, size.K, cls).to(prototypes.ptr.dtype.element_ty)
        c += tl.sum(weight.to(tl.float32) * z, 1)
        p = tl.load(
            prototypes.ptr + offs_k[:, None].to(tl.int64) * size.D + offs_d[None, :],
            mask=(offs_k < size.K)[:, None] & mask_d[None, :],
            other=0.0,
        )
        out = tl.dot(weight, p, out, input_precision=PRECISION)
    mask = mask_n[:, None] & mask_d[None, :]
    x = tl.load(image_ptr + offs_n[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d, mask=mask, other=0.0)
    dx = _gradient(out, x, s, inv, c, cls, bad, prototypes.inv_temperature, NORMALIZE)
    out_n = pixel_offset(dfeatures, n, size.w)
    out_ptrs = (
        dfeatures.ptr + b * dfeatures.stride_b + out_n[:, None] + offs_d[None, :].to(tl.int64) * dfeatures.stride_d
    )
    tl.store(out_ptrs, dx.to(dfeatures.ptr.dtype.element_ty), mask=mask)


def _form(features, num_classes: int, has_logits: bool) -> tuple[str, dict[str, int]]:
    """Which of the three kernels, and its settings."""
    dim, dtype, arch = features.shape[1], features.dtype, architecture(features)
    if dtype != torch.float32 and dim <= RESIDENT_DIM and not has_logits:
        settings = launch.find(arch, "contrast_backward_resident", dtype, dim, num_classes, layout(features))
        return "resident", settings | {"BLOCK_D": max(16, power_of_two(dim))}
    settings = launch.find(arch, "contrast_backward_tile", dtype, dim, num_classes, layout(features))
    if settings is not None and num_classes <= settings["BLOCK_K"]:
        return "tile", settings
    return "split", launch.find(arch, "contrast_backward_split", dtype, dim, num_classes, layout(features))


def _feature_gradient(features, dfeatures, operands, normalize: bool) -> None:
    grad, labels, prototypes, weights, saved, size = operands
    form, settings = _form(features, size.K, saved.logits is not None)
    tiles = features.shape[0] * triton.cdiv(size.P, settings["BLOCK_N"])
    arguments = (
        grad,
        feature_map(features),
        labels,
        prototypes,
        weights,
        saved,
        feature_map(dfeatures),
        size,
        normalize,
    )
    if form == "resident":
        backward_resident_kernel[(tiles,)](*arguments, **settings)
    elif form == "tile":
        backward_tile_kernel[(tiles,)](*arguments, precision(features.dtype), **settings)
    else:
        grid = (tiles, triton.cdiv(size.D, settings["BLOCK_O"]))
        backward_split_kernel[grid](*arguments, precision(features.dtype), **settings)


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
    operands = (
        incoming(grad_loss, denominator), labels_at(labels, flag(features), height, width, ignore_index),
        Prototypes(prototypes.to(features.dtype).contiguous(), 1 / temperature), weights_of(class_weight, pixel_weight),
        Saved(lse, inv_norm, logits if logits.numel() else None), size_of(features, num_classes),
    )  # fmt: skip
    with on_device_of(features):
        if needs_dfeatures:
            _feature_gradient(features, dfeatures, operands, normalize)
        if needs_dprototypes:
            prototype_gradient(features, dprototypes, operands)
    return dfeatures, dprototypes
