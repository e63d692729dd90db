"""prototype_contrastive_loss, forward, with any target: smoothed labels, probabilities, a teacher, sigmoid; from dots or from given logits.

K is streamed: with t computed tile by tile, too, nothing of [N, K] is in memory. Floor: features read K / BLOCK_K times, the second time on
from L2 (the tile is D x BLOCK_N), probabilities once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..pixels import pixel_offset, read_weights, softplus, tile_of
from .forward import finish_pixels, save_logits
from .logits import dots, inverse_norm, inverse_temperature, logits_of
from .targets import aimed_at, class_weights, find_bad, raise_bad, read_target, target_tile, with_margin


@triton.jit
def _include_targets(z, aimed, w, target, offs_k, K, top, total, mass, value):
    """One more block of logits and of targets q = w aimed: maximum, and in float64 sum of exponentials, of q, and of q (z - top) so far.
    What has no q adds nothing, however low its logit; but a label of weight 0 whose loss is infinite makes NaN, as in F.cross_entropy.
    Sigmoid: value is the loss itself."""
    mask_k = (offs_k < K)[None, :]
    q = w[None, :] * aimed
    adds = q != 0
    if target.labels is not None:
        adds = adds | (mask_k & (target.share == 0) & (aimed != 0))
    if target.sigmoid is not None:
        terms = w[None, :] * softplus(z) - tl.where(aimed == 0, 0.0, q * z)
        value += tl.sum(tl.where(mask_k, terms, 0.0), 1).to(tl.float64)
    else:
        z = tl.where(mask_k, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), 1).to(tl.float64)
        value += tl.where(mass == 0, 0.0, mass * (top - base))
        value += tl.sum(tl.where(adds, q * (z - base[:, None]), 0.0), 1).to(tl.float64)
        top = new_top
        mass += tl.sum(q, 1).to(tl.float64)
    return top, total, mass, value


@triton.jit
def target_forward_kernel(
    size, features, target, prototypes, weights, saved, loss, logits_ptr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Any target. logits_ptr [B, K, P]: logits that are there already (of pooled classes) instead of dots."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_target(target, b, n, mask_n, size)
    offs_n = pixel_offset(features, n, size.w)
    image_ptr = features.ptr + b * features.stride_b
    inv = tl.full([BLOCK_N], 1.0, tl.float32)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float64)
    mass = tl.zeros([BLOCK_N], tl.float64)
    value = tl.zeros([BLOCK_N], tl.float64)
    seen = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, size.K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        if logits_ptr is not None:
            ptrs = logits_ptr + (b * size.K + offs_k[None, :]) * size.P + n[:, None]
            z = tl.load(ptrs, mask=mask_n[:, None] & (offs_k < size.K)[None, :], other=0.0)
        else:
            acc, quadratic, square = dots(
                image_ptr, features.stride_d, prototypes, b, offs_n, mask_n, k0, size.K, size.D,
                BLOCK_N, BLOCK_K, BLOCK_D, NORMALIZE, PRECISION,
            )  # fmt: skip
            if NORMALIZE:
                inv = inverse_norm(square)
            scale = inv * inverse_temperature(prototypes)
            z, linear, _ = logits_of(acc, quadratic, scale, b, offs_k, prototypes, size.K)
            save_logits(saved, linear, b, n, mask_n, offs_k, size)
        z = with_margin(z, cls, offs_k, prototypes)
        t = target_tile(target, cls, b, n, mask_n, k0, size, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION)
        bad = find_bad(target, t, bad)
        seen += tl.sum(t, 1)
        w = class_weights(weights, offs_k, size.K)
        aimed = aimed_at(t, target)
        top, total, mass, value = _include_targets(z, aimed, w, target, offs_k, size.K, top, total, mass, value)
    raise_bad(target, bad)
    if target.probabilities is not None:
        cls = tl.where(mask_n & (seen != 0), 0, -1)
    counted = (cls >= 0).to(tl.float32)
    class_weight, pixel_weight = read_weights(weights, cls, b * size.P + n)
    log_total = tl.zeros([BLOCK_N], tl.float32)
    if target.sigmoid is not None:
        top = log_total
    else:
        log_total = tl.log(total.to(tl.float32))
        value = mass * log_total - value
        if target.labels is not None:
            counted = class_weight
    value = tl.where(cls >= 0, pixel_weight * value.to(tl.float32), 0.0)
    finish_pixels(loss, saved, b * size.P + n, mask_n, value, counted, bad, inv, top, log_total)
