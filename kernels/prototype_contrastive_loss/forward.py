"""prototype_contrastive_loss, forward. One program owns BLOCK_N pixels of one image and all K prototypes.

Neither [N, K] logits nor unit features need reach memory. Floor: feat is read once, S bytes; 12 bytes per pixel written (lse, inv_norm);
2 N D K operations. Where they are at most S / 2 the logits are worth saving: 4 K bytes per pixel spare the backward a whole pass over D.
Two forms: D streamed with K blocks outside (any D, any K); and, for half floats, the pixel tile resident with K streamed (D <= 512).
lse is kept in float64: at a low temperature it is large, and what float32 rounds off would be seen in every p = exp(z - lse).
Shapes: feat [B, D, P] any strides; proto [K, D] contiguous, in feat's dtype; label [B, H, W]; lse, inv_norm [B, P]; logits [B, K, P].
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..pixels import pixel_offset, read_class, read_weights, tile_of
from .logits import dots, inverse_norm, inverse_temperature, logits_of
from .targets import with_margin


@triton.jit
def save_logits(saved, z, b, n, mask_n, offs_k, size):
    """Without the bias: a dot product taken from a sum with one that is much larger would have lost its digits."""
    if saved.logits is not None:
        ptrs = saved.logits + (b * size.K + offs_k[None, :]) * size.P + n[:, None]
        tl.store(ptrs, z, mask=mask_n[:, None] & (offs_k < size.K)[None, :])


@triton.jit
def _include(acc, quadratic, scale, target, prototypes, saved, b, n, mask_n, offs_k, size, cls, top, total, z_label):
    """One more block of dots into the running maximum, the sum of exponentials and the label's logit."""
    z, linear, variance = logits_of(acc, quadratic, scale, b, offs_k, prototypes, size.K)
    save_logits(saved, linear, b, n, mask_n, offs_k, size)
    z = with_margin(z, cls, offs_k, prototypes)
    z = tl.where((offs_k < size.K)[None, :], z, -float("inf"))
    own = z
    if target.mean_variance is not None:
        own = z - variance
    new_top = tl.maximum(top, tl.max(z, 1))
    base = new_top
    if prototypes.bias is not None:
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # all biases so far may be -inf
    total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), 1)
    z_label += tl.sum(tl.where(offs_k[None, :] == cls[:, None], own, 0.0), 1)
    return new_top, total, z_label


@triton.jit
def finish_pixels(loss, saved, pixel, mask_n, value, counted, bad, inv, top, log_total):
    """Per pixel: lse, inv_norm and, for reduction "none", the loss; else one partial loss and weight a program."""
    poison = tl.where(bad, float("nan"), 0.0)
    if saved.lse is not None:
        tl.store(saved.lse + pixel, top.to(tl.float64) + log_total.to(tl.float64), mask=mask_n)
    if saved.inv_norm is not None:
        tl.store(saved.inv_norm + pixel, inv, mask=mask_n)
    if loss.map_ptr is not None:
        tl.store(loss.map_ptr + pixel, value + poison, mask=mask_n)
    else:
        tl.store(loss.partial_ptr + tl.program_id(0), tl.sum(value + poison, 0))
        tl.store(loss.partial_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(counted + poison, 0))


@triton.jit
def _finish_labels(weights, loss, saved, b, n, mask_n, size, cls, bad, inv, top, total, z_label):
    pixel = b * size.P + n
    log_total = tl.log(total)
    class_weight, pixel_weight = read_weights(weights, cls, pixel)
    value = tl.where(cls >= 0, class_weight * pixel_weight * ((top - z_label) + log_total), 0.0)
    finish_pixels(loss, saved, pixel, mask_n, value, class_weight, bad, inv, top, log_total)


@triton.jit
def forward_kernel(
    size, features, target, prototypes, weights, saved, loss,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_class(target.labels, b, n, mask_n, size)
    offs_n = pixel_offset(features, n, size.w)
    image_ptr = features.ptr + b * features.stride_b
    offs_k = tl.arange(0, BLOCK_K)

    acc, quadratic, square = dots(
        image_ptr, features.stride_d, prototypes, b, offs_n, mask_n, 0, size.K, size.D,
        BLOCK_N, BLOCK_K, BLOCK_D, NORMALIZE, PRECISION,
    )  # fmt: skip
    inv = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORMALIZE:
        inv = inverse_norm(square)
    scale = inv * inverse_temperature(prototypes)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    z_label = tl.zeros([BLOCK_N], tl.float32)
    top, total, z_label = _include(
        acc, quadratic, scale, target, prototypes, saved, b, n, mask_n, offs_k, size, cls, top, total, z_label
    )
    for k0 in range(BLOCK_K, size.K, BLOCK_K):
        acc, quadratic, _ = dots(
            image_ptr, features.stride_d, prototypes, b, offs_n, mask_n, k0, size.K, size.D,
            BLOCK_N, BLOCK_K, BLOCK_D, False, PRECISION,
        )  # fmt: skip
        top, total, z_label = _include(
            acc, quadratic, scale, target, prototypes, saved, b, n, mask_n, k0 + offs_k, size, cls, top, total, z_label
        )
    _finish_labels(weights, loss, saved, b, n, mask_n, size, cls, bad, inv, top, total, z_label)


@triton.jit
def forward_resident_kernel(
    size, features, target, prototypes, weights, saved, loss,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Half floats, D <= BLOCK_D, no variances: x is read once whatever K is."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_class(target.labels, b, n, mask_n, size)
    offs_n = pixel_offset(features, n, size.w)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < size.D
    x = tl.load(
        features.ptr + b * features.stride_b + offs_n[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d,
        mask=mask_n[:, None] & mask_d[None, :],
        other=0.0,
    )
    inv = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORMALIZE:
        wide = x.to(tl.float32)
        inv = inverse_norm(tl.sum(wide * wide, 1))
    scale = inv * inverse_temperature(prototypes)
    proto_ptr = prototypes.ptr
    if prototypes.stride_b is not None:
        proto_ptr += b * prototypes.stride_b
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    z_label = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, size.K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        p = tl.load(
            proto_ptr + offs_k[None, :].to(tl.int64) * size.D + offs_d[:, None],
            mask=(offs_k < size.K)[None, :] & mask_d[:, None],
            other=0.0,
        )
        acc = tl.dot(x, p)
        top, total, z_label = _include(
            acc, acc, scale, target, prototypes, saved, b, n, mask_n, offs_k, size, cls, top, total, z_label
        )
    _finish_labels(weights, loss, saved, b, n, mask_n, size, cls, bad, inv, top, total, z_label)
