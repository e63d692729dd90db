"""What a pixel's logits are compared with, and what the loss makes of both: for the forward, the backward and the prototypes' gradient.

    q_k = w_k (keep t_k + share),   m = sum_k q_k
    softmax  loss = m lse(z) - sum_k q_k z_k,                 dz_k = m p_k - q_k
    sigmoid  loss = sum_k w_k log(1 + exp(z_k)) - q_k z_k,    dz_k = w_k sigmoid(z_k) - q_k

t is a label's one-hot, given probabilities, or a teacher's softmax that is computed tile by tile. A label alone (softmax, no smoothing) is
the plain path: its class weight is part of the pixel's scale, and dz = p - one-hot. Every choice is made when a kernel is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..pixels import pixel_offset, read_class, read_weights, tile_of
from .logits import dots, inverse_temperature, logits_again


@triton.jit
def softmax_of(z, lse):
    """exp(z - lse) of logits [BLOCK_N, BLOCK_K]; lse [BLOCK_N] in float64 is taken off in two floats, in float32 as it is."""
    high = lse.to(tl.float32)
    z = z - high[:, None]
    if lse.dtype == tl.float64:
        z -= (lse - high.to(tl.float64)).to(tl.float32)[:, None]
    return tl.exp(z)


@triton.jit
def read_target(target, b, n, mask_n, size):
    """-> class (-1: nothing to compare with; 0 where a target is no label), bad."""
    if target.labels is not None:
        cls, bad = read_class(target.labels, b, n, mask_n, size)
    else:
        cls = tl.where(mask_n, 0, -1)
        bad = n < 0
        if target.scale is not None:
            scale = tl.load(target.scale + b * size.P + n, mask=mask_n, other=0.0)
            cls = tl.where(scale == 0, -1, 0)
            bad = scale != scale
    return cls, bad


@triton.jit
def class_weights(weights, offs_k, K):
    """[BLOCK_K]: 1 where none are given, 0 beyond K."""
    w = (offs_k < K).to(tl.float32)
    if weights.class_ptr is not None:
        w = tl.load(weights.class_ptr + offs_k, mask=offs_k < K, other=0.0)
    return w


@triton.jit
def with_margin(z, cls, offs_k, prototypes):
    if prototypes.margin is not None:
        z = tl.where(offs_k[None, :] == cls[:, None], z - prototypes.margin * inverse_temperature(prototypes), z)
    return z


@triton.jit
def target_tile(target, cls, b, n, mask_n, k0, size, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """t [BLOCK_N, BLOCK_K] for the classes from k0 on, 0 beyond K."""
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask = mask_n[:, None] & (offs_k < size.K)[None, :]
    if target.labels is not None:
        t = (offs_k[None, :] == cls[:, None]).to(tl.float32)
    elif target.probabilities is not None:
        given = target.probabilities
        i = n // size.w
        offs_n = b * given.stride_b + i.to(tl.int64) * given.stride_h + (n - i * size.w).to(tl.int64) * given.stride_w
        t = tl.load(
            given.ptr + offs_n[:, None] + offs_k[None, :].to(tl.int64) * given.stride_k, mask=mask, other=0.0
        ).to(tl.float32)
    else:
        teacher = target.teacher
        features = teacher.features
        i = n // size.w
        offs_n = i.to(tl.int64) * features.stride_h + (n - i * size.w).to(tl.int64) * features.stride_w
        image_ptr = features.ptr + b * features.stride_b
        acc, _, _ = dots(
            image_ptr, features.stride_d, teacher.prototypes, b, offs_n, mask_n, k0, size.K, teacher.dim,
            BLOCK_N, BLOCK_K, BLOCK_D, False, PRECISION,
        )  # fmt: skip
        u = tl.load(teacher.u + b * size.P + n, mask=mask_n, other=0.0)
        v = tl.load(teacher.v + offs_k, mask=offs_k < size.K, other=0.0)
        t = tl.where(mask, softmax_of(acc * inverse_temperature(teacher.prototypes) + v[None, :], -u), 0.0)
    return t


@triton.jit
def smoothed(t, target, weights, offs_k, K):
    """q = w_k (keep t + share), 0 beyond K."""
    return class_weights(weights, offs_k, K)[None, :] * aimed_at(t, target)


@triton.jit
def aimed_at(t, target):
    return target.keep * t + target.share


@triton.jit
def find_bad(target, t, bad):
    """`bad`, and where a given probability is negative, NaN or infinite."""
    if target.probabilities is not None:
        wrong = (t < 0) | (t != t) | (t == float("inf"))
        bad = bad | (tl.max(wrong.to(tl.int32), 1) > 0)
    return bad


@triton.jit
def raise_bad(target, bad):
    if target.probabilities is not None:
        if tl.max(bad.to(tl.int32), 0) > 0:
            tl.atomic_max(target.probabilities.flag, tl.full((), 0, tl.int64) + target.probabilities.bad)


@triton.jit
def read_pixels(values_ptr, b, n, mask_n, size):
    """[BLOCK_N] of a map [B, P]; 0 where there is none."""
    values = tl.zeros([n.shape[0]], tl.float32)
    if values_ptr is not None:
        values = tl.load(values_ptr + b * size.P + n, mask=mask_n, other=0.0)
    return values


@triton.jit
def pixel_scale(grad, weights, plain, b, n, size, cls, bad):
    """s = grad_loss * class weight (of a plain label) * pixel weight / denominator; exactly 0 where unlabelled, NaN at a bad label."""
    i = n // size.w
    offs = b * grad.stride_b + i.to(tl.int64) * grad.stride_h + (n - i * size.w).to(tl.int64) * grad.stride_w
    incoming = tl.load(grad.ptr + offs, mask=cls >= 0, other=0.0)
    denominator = tl.load(grad.denominator)
    class_weight, pixel_weight = read_weights(weights, cls, b * size.P + n)
    if plain is not None:
        pixel_weight = class_weight * pixel_weight
    s = pixel_weight * incoming.to(tl.float32)
    s = tl.where(denominator == 0, 0.0, s / tl.where(denominator == 0, 1.0, denominator))
    return tl.where(bad, float("nan"), tl.where(cls >= 0, s, 0.0))


@triton.jit
def target_pixels_kernel(
    grad, target, weights, scale_ptr, mass_ptr, size,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Before the backward of a target that is not plain: s and the sum of its q of each pixel, [B, P]."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_target(target, b, n, mask_n, size)
    mass = tl.zeros([BLOCK_N], tl.float64)
    seen = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, size.K, BLOCK_K):
        t = target_tile(target, cls, b, n, mask_n, k0, size, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION)
        bad = find_bad(target, t, bad)
        seen += tl.sum(t, 1)
        mass += tl.sum(smoothed(t, target, weights, k0 + tl.arange(0, BLOCK_K), size.K), 1).to(tl.float64)
    if target.probabilities is not None:
        cls = tl.where(mask_n & (seen != 0), 0, -1)
    s = pixel_scale(grad, weights, target.plain, b, n, size, cls, bad)
    tl.store(scale_ptr + b * size.P + n, s, mask=mask_n)
    tl.store(mass_ptr + b * size.P + n, mass.to(tl.float32), mask=mask_n)


@triton.jit
def residual(z, lse, offs_k, cls):
    """The plain path: p_k - [k = label] -> [BLOCK_N, BLOCK_K]; beyond K anything."""
    p = softmax_of(z, lse)
    return tl.where(offs_k[None, :] == cls[:, None], p - 1.0, p)


@triton.jit
def logit_weights(z, lse, offs_k, K, cls):
    """As `residual`, but 0 beyond K."""
    p = softmax_of(z, lse)
    return tl.where((offs_k < K)[None, :], tl.where(offs_k[None, :] == cls[:, None], p - 1.0, p), 0.0)


@triton.jit
def row_weights(z, lse, mass, target, weights, cls, b, n, mask_n, k0, size,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dz / s [BLOCK_N, BLOCK_K] of any target but a plain one, 0 beyond K."""
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask = mask_n[:, None] & (offs_k < size.K)[None, :]
    if target.given is not None:
        w = tl.load(target.given.ptr + (b * size.K + offs_k[None, :]) * size.P + n[:, None], mask=mask, other=0.0)
        if target.given.divide is not None:
            scale = read_pixels(target.scale, b, n, mask_n, size)
            w = w / tl.where(scale == 0, 1.0, scale)[:, None]
    else:
        t = target_tile(target, cls, b, n, mask_n, k0, size, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION)
        q = smoothed(t, target, weights, offs_k, size.K)
        if target.sigmoid is not None:
            w = class_weights(weights, offs_k, size.K)[None, :] * tl.sigmoid(z) - q
        else:
            w = mass[:, None] * softmax_of(z, lse) - q
    return tl.where(mask, w, 0.0)


class Tile(NamedTuple):
    """In a kernel of the backward: a tile of pixels of image b, and what is known of each."""

    b: tl.tensor
    n: tl.tensor
    mask: tl.tensor
    offset: tl.tensor  # in the features
    cls: tl.tensor
    mass: tl.tensor
    lse: tl.tensor  # the mass where none was saved
    inv: tl.tensor


@triton.jit
def saved_tile(features, target, saved, b, n, mask_n, cls, size):
    mass = read_pixels(target.mass, b, n, mask_n, size)
    lse = mass
    if saved.lse is not None:
        lse = tl.load(saved.lse + b * size.P + n, mask=mask_n, other=0.0)
    inv = tl.load(saved.inv_norm + b * size.P + n, mask=mask_n, other=0.0)
    return Tile(b, n, mask_n, pixel_offset(features, n, size.w), cls, mass, lse, inv)


@triton.jit
def weights_again(image_ptr, features, prototypes, target, weights, saved, tile, k0, size,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """For the prototypes from k0 on -> dz / s of any target (beyond K anything where it is plain), the logits, their linear part and the
    variances' part."""
    offs_k = k0 + tl.arange(0, BLOCK_K)
    z, linear, variance = logits_again(
        image_ptr, features, prototypes, saved, tile.b, tile.n, tile.offset, tile.mask, tile.inv, k0, size,
        BLOCK_N, BLOCK_K, BLOCK_D, PRECISION,
    )  # fmt: skip
    z = with_margin(z, tile.cls, offs_k, prototypes)
    if target.plain is not None:
        w = residual(z, tile.lse, offs_k, tile.cls)
    else:
        w = row_weights(
            z, tile.lse, tile.mass, target, weights, tile.cls, tile.b, tile.n, tile.mask, k0, size,
            BLOCK_N, BLOCK_K, BLOCK_D, PRECISION,
        )  # fmt: skip
    return w, z, linear, variance
