"""A tile of logits: dots of BLOCK_N pixels with BLOCK_K prototypes, and what makes logits of them. No [N, K] tensor need reach memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_norm(square):
    """1 / max(|x|, 1e-12), as F.normalize."""
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), 1e-12))


@triton.jit
def inverse_temperature(prototypes):
    inverse = prototypes.inv_temperature
    if prototypes.temperature is not None:
        inverse = 1.0 / tl.load(prototypes.temperature).to(tl.float32)
    return inverse


@triton.jit
def image_offset(prototypes, b):
    """Where the prototypes of image b begin."""
    offset = 0
    if prototypes.stride_b is not None:
        offset = b * prototypes.stride_b
    return offset


@triton.jit
def dots(image_ptr, stride_d, prototypes, b, offs_n, mask_n, k0, K, D,
         BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """For BLOCK_N pixels and the prototypes from k0 on, D in steps -> x·P_k [BLOCK_N, BLOCK_K]; x²·V_k where there are variances (else
    x·P_k again); |x|² where NORM."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    feat_ptrs = image_ptr + offs_n[:, None] + offs_d[None, :].to(tl.int64) * stride_d
    if prototypes.variances is not None:
        rows = offs_k[None, :].to(tl.int64) * D + offs_d[:, None]  # of both: a second address would spill
        proto_ptrs = prototypes.ptr + image_offset(prototypes, b) + rows
    else:
        proto_ptrs = prototypes.ptr + image_offset(prototypes, b) + offs_k[None, :].to(tl.int64) * D + offs_d[:, None]
    step = tl.full((), BLOCK_D, tl.int64) * stride_d
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    quadratic = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        mask_d = offs_d < D - d
        x = tl.load(feat_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        p = tl.load(proto_ptrs, mask=mask_k[None, :] & mask_d[:, None], other=0.0)
        if prototypes.wide is not None:
            acc = tl.dot(x.to(tl.float32), p.to(tl.float32), acc, input_precision="tf32x3")  # float32's digits
        else:
            acc = tl.dot(x, p.to(x.dtype), acc, input_precision=PRECISION)
        if NORM:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, 1)
        if prototypes.variances is not None:
            v = tl.load(
                prototypes.variances + image_offset(prototypes, b) + rows + d,
                mask=mask_k[None, :] & mask_d[:, None],
                other=0.0,
            )
            wide = x.to(tl.float32)
            # half floats: in TF32, whose mantissa is theirs and whose range is float32's
            quadratic = tl.dot(
                wide * wide, v, quadratic, input_precision=PRECISION if x.dtype == tl.float32 else "tf32"
            )
        feat_ptrs += step
        proto_ptrs += BLOCK_D
    return acc, quadratic, square


@triton.jit
def logits_of(acc, quadratic, scale, b, offs_k, prototypes, K):
    """-> logits [BLOCK_N, BLOCK_K] before a margin; of them the linear part, and the variances' (the linear one where there are none).
    scale: inv_norm / temperature."""
    linear = acc * scale[:, None]
    z = linear
    variance = linear
    if prototypes.variances is not None:
        variance = quadratic * (0.5 * scale * scale)[:, None]
        z = z + variance
    if prototypes.bias is not None:
        z = z + read_bias(prototypes, b, offs_k, K)[None, :]
    return z, linear, variance


@triton.jit
def read_bias(prototypes, b, offs_k, K):
    """[BLOCK_K] float32; 0 where there is none."""
    bias = tl.zeros([offs_k.shape[0]], tl.float32)
    if prototypes.bias is not None:
        ptrs = prototypes.bias + offs_k
        if prototypes.bias_b is not None:
            ptrs += b * prototypes.bias_b
        bias = tl.load(ptrs, mask=offs_k < K, other=0.0).to(tl.float32)
    return bias


@triton.jit
def logits_again(image_ptr, features, prototypes, saved, b, n, offs_n, mask_n, inv, k0, size,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of the backward, for the prototypes from k0 on: saved, or computed again -> as `logits_of`."""
    offs_k = k0 + tl.arange(0, BLOCK_K)
    if saved.logits is not None:
        linear = tl.load(
            saved.logits + (b * size.K + offs_k[None, :]) * size.P + n[:, None],
            mask=mask_n[:, None] & (offs_k < size.K)[None, :],
            other=0.0,
        )
        z = linear
        if prototypes.bias is not None:
            z = z + read_bias(prototypes, b, offs_k, size.K)[None, :]
        variance = linear
    else:
        acc, quadratic, _ = dots(
            image_ptr, features.stride_d, prototypes, b, offs_n, mask_n, k0, size.K, size.D,
            BLOCK_N, BLOCK_K, BLOCK_D, False, PRECISION,
        )  # fmt: skip
        scale = inv * inverse_temperature(prototypes)
        z, linear, variance = logits_of(acc, quadratic, scale, b, offs_k, prototypes, size.K)
    return z, linear, variance
