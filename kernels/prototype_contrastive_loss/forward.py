"""prototype_contrastive_loss, forward. One program owns BLOCK_N pixels of one image and all K prototypes.

Neither [N, K] logits nor unit features need reach memory. Floor: feat is read once, S bytes; 12 bytes a pixel are written (lse, inv_norm);
2 N D K operations. Where K <= D/4 the logits are worth saving: 4 K bytes a pixel spare the backward a whole pass over D.
Two forms: D streamed with K blocks outside (any D, any K); and, for half floats, the pixel tile resident with K streamed (D <= 512).
lse is kept in float64: at a low temperature it is large, and what float32 rounds off would be seen in every p = exp(z - lse).
Shapes: feat [B, D, P] any strides; proto [K, D] contiguous, in feat's dtype; label [B, H, W]; lse, inv_norm [B, P]; logits [B, K, P].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import launch
from ..operands import Loss, Prototypes, Saved, feature_map, labels_at, size_of, weights_of
from ..pixels import (
    INTERPRETED,
    architecture,
    finish_kernel,
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

RESIDENT_DIM = 512  # channels of a pixel tile that is held on chip
LSE_DTYPE = torch.float64


@triton.jit
def dots(image_ptr, stride_d, prototypes, offs_n, mask_n, k0, size,
         BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x·P_k for BLOCK_N pixels and the prototypes from k0 on, D in steps -> [BLOCK_N, BLOCK_K]; and |x|^2 where NORM."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask_k = offs_k < size.K
    feat_ptrs = image_ptr + offs_n[:, None] + offs_d[None, :].to(tl.int64) * stride_d
    proto_ptrs = prototypes.ptr + offs_k[None, :].to(tl.int64) * size.D + offs_d[:, None]
    step = tl.full((), BLOCK_D, tl.int64) * stride_d
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, size.D, BLOCK_D):
        mask_d = offs_d < size.D - d
        x = tl.load(feat_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        p = tl.load(proto_ptrs, mask=mask_k[None, :] & mask_d[:, None], other=0.0)
        acc = tl.dot(x, p, acc, input_precision=PRECISION)
        if NORM:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, 1)
        feat_ptrs += step
        proto_ptrs += BLOCK_D
    return acc, square


@triton.jit
def inverse_norm(square):
    """1 / max(|x|, 1e-12), as F.normalize."""
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), 1e-12))


@triton.jit
def softmax_of(z, lse):
    """exp(z - lse) of logits [BLOCK_N, BLOCK_K]; lse [BLOCK_N] in float64 is taken off in two floats, in float32 as it is."""
    high = lse.to(tl.float32)
    z = z - high[:, None]
    if lse.dtype == tl.float64:
        z -= (lse - high.to(tl.float64)).to(tl.float32)[:, None]
    return tl.exp(z)


@triton.jit
def logits_again(image_ptr, features, prototypes, saved, b, n, offs_n, mask_n, inv, k0, size,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of the backward: z for the prototypes from k0 on -> [BLOCK_N, BLOCK_K], saved or computed again."""
    if saved.logits is not None:
        offs_k = k0 + tl.arange(0, BLOCK_K)
        ptrs = saved.logits + (b * size.K + offs_k[None, :]) * size.P + n[:, None]
        z = tl.load(ptrs, mask=mask_n[:, None] & (offs_k < size.K)[None, :], other=0.0)
    else:
        acc, _ = dots(
            image_ptr,
            features.stride_d,
            prototypes,
            offs_n,
            mask_n,
            k0,
            size,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
            False,
            PRECISION,
        )
        z = acc * (inv * prototypes.inv_temperature)[:, None]
    return z


@triton.jit
def _include(z, offs_k, K, cls, top, total, z_label):
    """One more block of logits into the running maximum, the sum of exponentials and the label's logit."""
    z = tl.where((offs_k < K)[None, :], z, -float("inf"))
    new_top = tl.maximum(top, tl.max(z, 1))
    total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), 1)
    z_label += tl.sum(tl.where(offs_k[None, :] == cls[:, None], z, 0.0), 1)
    return new_top, total, z_label


@triton.jit
def _save_logits(saved, z, b, n, mask_n, offs_k, size):
    if saved.logits is not None:
        ptrs = saved.logits + (b * size.K + offs_k[None, :]) * size.P + n[:, None]
        tl.store(ptrs, z, mask=mask_n[:, None] & (offs_k < size.K)[None, :])


@triton.jit
def _finish_pixels(weights, loss, saved, b, n, mask_n, size, cls, bad, inv, top, total, z_label):
    """Per pixel: lse, inv_norm and, for reduction "none", the loss; else one partial loss and weight a program."""
    pixel = b * size.P + n
    log_total = tl.log(total)
    class_weight, pixel_weight = read_weights(weights, cls, pixel)
    value = tl.where(cls >= 0, class_weight * pixel_weight * ((top - z_label) + log_total), 0.0)
    poison = tl.where(bad, float("nan"), 0.0)
    if saved.lse is not None:
        tl.store(saved.lse + pixel, top.to(tl.float64) + log_total.to(tl.float64), mask=mask_n)
        tl.store(saved.inv_norm + pixel, inv, mask=mask_n)
    if loss.map_ptr is not None:
        tl.store(loss.map_ptr + pixel, value + poison, mask=mask_n)
    else:
        tl.store(loss.partial_ptr + tl.program_id(0), tl.sum(value + poison, 0))
        tl.store(loss.partial_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(class_weight + poison, 0))


@triton.jit
def forward_kernel(
    features, labels, prototypes, weights, loss, saved, size,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_class(labels, b, n, mask_n, size)
    offs_n = pixel_offset(features, n, size.w)
    image_ptr = features.ptr + b * features.stride_b
    offs_k = tl.arange(0, BLOCK_K)

    acc, square = dots(
        image_ptr,
        features.stride_d,
        prototypes,
        offs_n,
        mask_n,
        0,
        size,
        BLOCK_N,
        BLOCK_K,
        BLOCK_D,
        NORMALIZE,
        PRECISION,
    )
    inv = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORMALIZE:
        inv = inverse_norm(square)
    scale = inv * prototypes.inv_temperature
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    z_label = tl.zeros([BLOCK_N], tl.float32)
    z = acc * scale[:, None]
    _save_logits(saved, z, b, n, mask_n, offs_k, size)
    top, total, z_label = _include(z, offs_k, size.K, cls, top, total, z_label)
    for k0 in range(BLOCK_K, size.K, BLOCK_K):
        acc, _ = dots(
            image_ptr,
            features.stride_d,
            prototypes,
            offs_n,
            mask_n,
            k0,
            size,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
            False,
            PRECISION,
        )
        z = acc * scale[:, None]
        _save_logits(saved, z, b, n, mask_n, k0 + offs_k, size)
        top, total, z_label = _include(z, k0 + offs_k, size.K, cls, top, total, z_label)
    _finish_pixels(weights, loss, saved, b, n, mask_n, size, cls, bad, inv, top, total, z_label)


@triton.jit
def forward_resident_kernel(
    features, labels, prototypes, weights, loss, saved, size,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Half floats, D <= BLOCK_D: x is read once whatever K is."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_class(labels, b, n, mask_n, size)
    offs_n = pixel_offset(features, n, size.w)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < size.D
    x = tl.load(features.ptr + b * features.stride_b + offs_n[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d,
                mask=mask_n[:, None] & mask_d[None, :], other=0.0)  # fmt: skip
    inv = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORMALIZE:
        wide = x.to(tl.float32)
        inv = inverse_norm(tl.sum(wide * wide, 1))
    scale = inv * prototypes.inv_temperature
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    z_label = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, size.K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < size.K
        p = tl.load(
            prototypes.ptr + offs_k[None, :].to(tl.int64) * size.D + offs_d[:, None],
            mask=mask_k[None, :] & mask_d[:, None],
            other=0.0,
        )
        z = tl.dot(x, p) * scale[:, None]
        top, total, z_label = _include(z, offs_k, size.K, cls, top, total, z_label)
    _finish_pixels(weights, loss, saved, b, n, mask_n, size, cls, bad, inv, top, total, z_label)


def saves_logits(num_classes: int, dim: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether 4 K bytes a pixel are saved for the backward: where they are few beside the features and the tile cannot stay on chip."""
    return num_classes * 4 <= dim and not _resident(dim, dtype)


def _resident(dim: int, dtype: torch.dtype) -> bool:
    return (
        dtype != torch.float32 and dim <= RESIDENT_DIM
    )  # FMA dots hold whole operand rows in registers: not for float32


def prototype_contrastive_forward(
    features,
    labels,
    prototypes,
    class_weight,
    pixel_weight,
    variances,
    *,
    temperature,
    normalize,
    ignore_index,
    reduction,
    save,
):
    """-> loss, denominator, lse [B, P], inv_norm [B, P], logits [B, K, P] or empty. Contract: `backends/reference.py`."""
    batch, dim, height, width = features.shape
    num_classes, pixels = prototypes.shape[0], height * width
    none = reduction == "none"
    loss = features.new_empty((batch, height, width) if none else (), dtype=torch.float32)
    denominator = torch.ones((), dtype=torch.float32, device=features.device) if none else torch.empty_like(loss)
    lse = features.new_empty((batch, pixels) if save else 0, dtype=LSE_DTYPE)
    inv_norm = torch.empty_like(lse, dtype=torch.float32)
    saved = save and saves_logits(num_classes, dim, features.dtype)
    logits = features.new_empty((batch, num_classes, pixels) if saved else 0, dtype=torch.float32)
    if batch * pixels == 0:
        return loss.zero_(), denominator.fill_(float(reduction != "mean")), lse, inv_norm, logits

    prototypes = prototypes.to(features.dtype).contiguous()
    resident = _resident(dim, features.dtype) and not saved
    name = "contrast_forward_resident" if resident else "contrast_forward"
    settings = launch.find(architecture(features), name, features.dtype, dim, num_classes, layout(features))
    programs = batch * triton.cdiv(pixels, settings["BLOCK_N"])
    partial = None if none else features.new_empty(2, programs, dtype=torch.float32)
    operands = (
        feature_map(features), labels_at(labels, flag(features), height, width, ignore_index),
        Prototypes(prototypes, 1 / temperature), weights_of(class_weight, pixel_weight), Loss(loss if none else None, partial),
        Saved(*((lse, inv_norm) if save else (None, None)), logits if saved else None), size_of(features, num_classes),
    )  # fmt: skip
    with on_device_of(features):
        if resident:
            settings = settings | {"BLOCK_D": max(16, power_of_two(dim))}
            forward_resident_kernel[(programs,)](*operands, normalize, **settings)
        else:
            forward_kernel[(programs,)](*operands, normalize, precision(features.dtype), **settings)
        if not none:
            finish_kernel[(1,)](
                partial, loss, denominator, programs, reduction == "mean", BLOCK=128 if INTERPRETED else 1024
            )
    return loss, denominator, lse, inv_norm, logits
