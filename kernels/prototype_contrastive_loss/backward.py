"""prototype_contrastive_loss, gradient of the features.

    dx = inv * s * ( sum_k w_k P_k / tau - c * inv * x ),   w_k = p_k - [k = label],   c = sum_k w_k z_k

c is a by-product of the softmax: the normalisation costs no pass over D. The pixel's scale s is taken out of the dot: w is in [-1, 1]
whatever the loss scale, and half floats lose nothing to underflow. c is formed from the rounded w, so that dx stays orthogonal to x.
Floor: feat read once, dfeat written once (2 S), 12 bytes per pixel of saves, 4 K more where the logits were saved; 2 to 4 N D K operations.
Three forms: the pixel tile resident (half floats, D <= 512, any K); all K in one tile, D in steps (K <= 64); both in steps.
Shapes: feat, dfeat [B, D, P] any strides; proto [K, D] contiguous, in feat's dtype; lse, inv_norm [B, P]; logits [B, K, P].
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..pixels import pixel_offset, tile_of
from .logits import image_offset, inverse_temperature, logits_again, logits_of
from .targets import (
    logit_weights,
    pixel_scale,
    read_pixels,
    read_target,
    saved_tile,
    softmax_of,
    weights_again,
    with_margin,
)


@triton.jit
def _gradient(out, x, s, inv, c, cls, bad, prototypes, RADIAL: tl.constexpr):
    """out = sum_k w_k P_k -> dx. Where nothing is labelled: 0, whatever x holds."""
    out = out * inverse_temperature(prototypes)
    if RADIAL:
        radial = tl.where(inv < 9.9e11, c * inv, 0.0)  # a clamped norm is a constant
        out = out - radial[:, None] * x.to(tl.float32)
    return tl.where((cls >= 0)[:, None] | bad[:, None], out * (inv * s)[:, None], 0.0)


@triton.jit
def backward_resident_kernel(
    size, features, target, prototypes, weights, saved, dfeatures, grad,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Plain targets, no variances."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_target(target, b, n, mask_n, size)
    s = pixel_scale(grad, weights, target.plain, b, n, size, cls, bad)
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
    proto_ptr = prototypes.ptr
    if prototypes.stride_b is not None:
        proto_ptr += b * prototypes.stride_b
    out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    c = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, size.K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        p = tl.load(
            proto_ptr + offs_k[:, None].to(tl.int64) * size.D + offs_d[None, :],
            mask=(offs_k < size.K)[:, None] & mask_d[None, :],
            other=0.0,
        )
        acc = tl.dot(x, tl.trans(p))
        scale = inv * inverse_temperature(prototypes)
        z, linear, _ = logits_of(acc, acc, scale, b, offs_k, prototypes, size.K)
        z = with_margin(z, cls, offs_k, prototypes)
        weight = logit_weights(z, lse, offs_k, size.K, cls).to(x.dtype)
        c += tl.sum(weight.to(tl.float32) * linear, 1)
        out = tl.dot(weight, p, out)
    dx = _gradient(out, x, s, inv, c, cls, bad, prototypes, NORMALIZE)
    out_n = pixel_offset(dfeatures, n, size.w)
    out_ptrs = (
        dfeatures.ptr + b * dfeatures.stride_b + out_n[:, None] + offs_d[None, :].to(tl.int64) * dfeatures.stride_d
    )
    tl.store(out_ptrs, dx.to(x.dtype), mask=mask)


@triton.jit
def backward_tile_kernel(
    size, features, target, prototypes, weights, saved, dfeatures, grad, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """K <= BLOCK_K, plain targets, no variances: the weights of a pixel are formed once, from saved or recomputed logits, and D is
    walked in steps."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_target(target, b, n, mask_n, size)
    s = pixel_scale(grad, weights, target.plain, b, n, size, cls, bad)
    lse = tl.load(saved.lse + b * size.P + n, mask=mask_n, other=0.0)
    inv = tl.load(saved.inv_norm + b * size.P + n, mask=mask_n, other=0.0)
    offs_n = pixel_offset(features, n, size.w)
    image_ptr = features.ptr + b * features.stride_b
    offs_k = tl.arange(0, BLOCK_K)
    z, linear, _ = logits_again(
        image_ptr, features, prototypes, saved, b, n, offs_n, mask_n, inv, 0, size, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION
    )
    z = with_margin(z, cls, offs_k, prototypes)
    weight = logit_weights(z, lse, offs_k, size.K, cls).to(prototypes.ptr.dtype.element_ty)
    c = tl.sum(weight.to(tl.float32) * linear, 1)

    offs_d = tl.arange(0, BLOCK_O)
    out_n = pixel_offset(dfeatures, n, size.w)
    feat_ptrs = image_ptr + offs_n[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d
    out_ptrs = (
        dfeatures.ptr + b * dfeatures.stride_b + out_n[:, None] + offs_d[None, :].to(tl.int64) * dfeatures.stride_d
    )
    proto_ptrs = prototypes.ptr + image_offset(prototypes, b) + offs_k[:, None].to(tl.int64) * size.D + offs_d[None, :]
    step = tl.full((), BLOCK_O, tl.int64) * features.stride_d
    out_step = tl.full((), BLOCK_O, tl.int64) * dfeatures.stride_d
    for d in range(0, size.D, BLOCK_O):
        mask = mask_n[:, None] & (offs_d < size.D - d)[None, :]
        p = tl.load(proto_ptrs, mask=(offs_k < size.K)[:, None] & (offs_d < size.D - d)[None, :], other=0.0)
        x = p
        if NORMALIZE:
            x = tl.load(feat_ptrs, mask=mask, other=0.0)
        out = tl.dot(weight, p, input_precision=PRECISION)
        dx = _gradient(out, x, s, inv, c, cls, bad, prototypes, NORMALIZE)
        tl.store(out_ptrs, dx.to(dfeatures.ptr.dtype.element_ty), mask=mask)
        feat_ptrs += step
        out_ptrs += out_step
        proto_ptrs += BLOCK_O


@triton.jit
def store_temperature(temperature_ptr, s, cost, cls, bad, prototypes):
    """The program's part of the temperature's gradient. cost: sum_k w_k (z_k - bias_k) of each pixel."""
    cost = tl.where(bad, float("nan"), tl.where(cls >= 0, s * cost.to(tl.float32), 0.0))
    tl.store(temperature_ptr + tl.program_id(0), -inverse_temperature(prototypes) * tl.sum(cost, 0))


class Slopes(NamedTuple):
    """Of a pixel: sums over the classes so far; y_k = z_k - bias_k, twice its variance term, which is quadratic. In float64 of float32
    features; half floats round far more, and have but the margin's part here: the other is a by-product of the features' gradient."""

    cost: tl.tensor  # w_k y_k
    # w_k of a softmax: 0 but for the rounding that all p_k have alike, and which times y is left out of the cost
    rest: tl.tensor
    mean: tl.tensor  # p_k y_k


@triton.jit
def _no_slopes(features, BLOCK_N: tl.constexpr):
    none = tl.zeros([BLOCK_N], tl.float32)
    if features.ptr.dtype.element_ty == tl.float32:
        none = none.to(tl.float64)
    return Slopes(none, none, none)


@triton.jit
def _add_slopes(slopes, target, prototypes, cls, lse, offs_k, K, w, z, linear, variance):
    cost, rest, mean = slopes
    if cost.dtype == tl.float64:
        softmax: tl.constexpr = target.sigmoid is None and target.given is None  # pyright: ignore[reportAssignmentType]
        y = with_margin(linear, cls, offs_k, prototypes)
        p = w
        if softmax:
            p = tl.where((offs_k < K)[None, :], softmax_of(z, lse), 0.0)
        if prototypes.variances is not None:
            if target.mean_variance is not None:
                cost += tl.sum(2 * p * variance, 1).to(tl.float64)
            else:
                y += 2 * variance
        cost += tl.sum(w * y, 1).to(tl.float64)
        if softmax:
            rest += tl.sum(w, 1).to(tl.float64)
            mean += tl.sum(p * y, 1).to(tl.float64)
    elif prototypes.margin is not None:
        at_label = tl.sum(tl.where(offs_k[None, :] == cls[:, None], w, 0.0), 1)
        cost -= prototypes.margin * inverse_temperature(prototypes) * at_label
    return Slopes(cost, rest, mean)


@triton.jit
def _cost(slopes, c):
    cost = slopes.cost - slopes.rest * slopes.mean
    if slopes.cost.dtype == tl.float32:
        cost = c + slopes.cost
    return cost


@triton.jit
def backward_split_kernel(
    size, features, target, prototypes, weights, saved, dfeatures, grad, temperature_ptr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Any K, D and target: a program owns BLOCK_O channels of its pixels' gradient and reads all their logits, or computes them again."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_target(target, b, n, mask_n, size)
    if target.plain is not None:
        s = pixel_scale(grad, weights, target.plain, b, n, size, cls, bad)
    else:
        s = read_pixels(target.scale, b, n, mask_n, size)
    tile = saved_tile(features, target, saved, b, n, mask_n, cls, size)
    image_ptr = features.ptr + b * features.stride_b
    offs_d = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_d = offs_d < size.D
    out = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    curved = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    c = tl.zeros([BLOCK_N], tl.float32)
    slopes = _no_slopes(features, BLOCK_N)
    for k0 in range(0, size.K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        exact, z, linear, variance = weights_again(
            image_ptr, features, prototypes, target, weights, saved, tile, k0, size,
            BLOCK_N, BLOCK_K, BLOCK_D, PRECISION,
        )  # fmt: skip
        if target.plain is not None:
            exact = tl.where((offs_k < size.K)[None, :], exact, 0.0)
        if temperature_ptr is not None:
            slopes = _add_slopes(slopes, target, prototypes, cls, tile.lse, offs_k, size.K, exact, z, linear, variance)
        weight = exact.to(features.ptr.dtype.element_ty)
        c += tl.sum(weight.to(tl.float32) * linear, 1)
        mask_p = (offs_k < size.K)[:, None] & mask_d[None, :]
        p = tl.load(
            prototypes.ptr + image_offset(prototypes, b) + offs_k[:, None].to(tl.int64) * size.D + offs_d[None, :],
            mask=mask_p,
            other=0.0,
        )
        p = p.to(weight.dtype)
        out = tl.dot(weight, p, out, input_precision=PRECISION)
        if prototypes.variances is not None:
            if target.mean_variance is not None:
                exact = tl.where((offs_k < size.K)[None, :], softmax_of(z, tile.lse), 0.0)
            c += 2 * tl.sum(exact * variance, 1)
            v = tl.load(
                prototypes.variances
                + image_offset(prototypes, b)
                + offs_k[:, None].to(tl.int64) * size.D
                + offs_d[None, :],
                mask=mask_p,
                other=0.0,
            )
            curved = tl.dot(exact, v, curved, input_precision=PRECISION if p.dtype == tl.float32 else "tf32")
    if temperature_ptr is not None:
        if tl.program_id(1) == 0:
            store_temperature(temperature_ptr, s, _cost(slopes, c), cls, bad, prototypes)
    if dfeatures.ptr is not None:
        mask = mask_n[:, None] & mask_d[None, :]
        x = tl.load(
            image_ptr + tile.offset[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d, mask=mask, other=0.0
        )
        if prototypes.variances is not None:
            scale = tile.inv * inverse_temperature(prototypes)
            out += x.to(tl.float32) * curved * scale[:, None]
        dx = _gradient(out, x, s, tile.inv, c, cls, bad, prototypes, NORMALIZE)
        out_n = pixel_offset(dfeatures, n, size.w)
        out_ptrs = (
            dfeatures.ptr + b * dfeatures.stride_b + out_n[:, None] + offs_d[None, :].to(tl.int64) * dfeatures.stride_d
        )
        tl.store(out_ptrs, dx.to(dfeatures.ptr.dtype.element_ty), mask=mask)
