"""class_moments: per class the sum of its pixels' (unit) features, of their squares, and their number. No sort, no float atomics.

A program owns BLOCK_K classes, BLOCK_O channels and one of a fixed number of groups of pixel tiles: one-hot dot, tile after tile; tiles
without a pixel of its classes are skipped unread (label maps are piecewise constant: K = 100 000 reads little more than K = 19). A second
kernel adds the groups in order. The one-hot side of the dot is exact; half floats enter as x̂ = high + low, so the sums are as good as
float32's. Floor: S bytes (2 S where D > BLOCK_O and normalize: the norms are a pass of their own), 2 N D BLOCK_K operations.
Shapes: feat [B, D, P] any strides; label [B, H, W]; sums, squares [K, D] float32; counts [K] int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch as settings
from .pixels import (
    architecture,
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
from .prototype_contrastive_loss.forward import inverse_norm
from .prototype_contrastive_loss.prototypes import add_groups_kernel, group_tiles


@triton.jit
def norms_kernel(feat_ptr, inv_ptr, P, D, w, stride_b, stride_d, stride_h, stride_w,
                 FLAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """inv_norm [B, P] = 1 / max(|x|, 1e-12)."""
    tiles = tl.cdiv(P, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < P
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = pixel_offset(n, w, stride_h, stride_w, FLAT)
    feat_ptrs = feat_ptr + b * stride_b + offs_n[:, None] + offs_d[None, :].to(tl.int64) * stride_d
    step = tl.full((), BLOCK_D, tl.int64) * stride_d
    square = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        x = tl.load(feat_ptrs, mask=mask_n[:, None] & (offs_d < D - d)[None, :], other=0.0).to(tl.float32)
        square += tl.sum(x * x, 1)
        feat_ptrs += step
    tl.store(inv_ptr + b * P + n, inverse_norm(square), mask=mask_n)


@triton.jit
def moments_kernel(
    feat_ptr, label_ptr, inv_ptr, sums_ptr, squares_ptr, counts_ptr, flag_ptr,
    P, D, K, w, H, W, scale_h, scale_w, label_b, label_h, label_w, ignore_index, stride_b, stride_d, stride_h, stride_w,
    tiles, tiles_per_group,
    NORMALIZE: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """inv_ptr None and NORMALIZE: BLOCK_O holds all of D and the norm is formed here."""
    blocks_o = tl.cdiv(D, BLOCK_O)
    group = tl.program_id(1)
    offs_k = (tl.program_id(0) // blocks_o) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = (tl.program_id(0) % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_d = offs_d < D
    image_tiles = tl.cdiv(P, BLOCK_N)
    sums = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    squares = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    counts = tl.zeros([BLOCK_K], tl.int32)
    spoiled = tl.zeros([BLOCK_K], tl.int32)
    for tile in range(group * tiles_per_group, tl.minimum((group + 1) * tiles_per_group, tiles)):
        b = (tile // image_tiles).to(tl.int64)
        n = (tile % image_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        cls, _ = read_class(
            label_ptr, flag_ptr, b, n, n < P, w, H, W, scale_h, scale_w, label_b, label_h, label_w, ignore_index, K
        )
        mine = (offs_k[:, None] == cls[None, :]).to(tl.int32)
        hit = tl.max(mine, 0) > 0
        if tl.max(hit.to(tl.int32), 0) > 0:
            counts += tl.sum(mine, 1)
            offs_n = pixel_offset(n, w, stride_h, stride_w, FLAT)
            # the mask of the tile's edge alone: with the labels in it, loads would be narrow
            x = tl.load(feat_ptr + b * stride_b + offs_n[:, None] + offs_d[None, :].to(tl.int64) * stride_d,
                        mask=(n < P)[:, None] & mask_d[None, :], other=0.0)  # fmt: skip
            unit = x.to(tl.float32)
            if NORMALIZE:
                if inv_ptr is not None:
                    inv = tl.load(inv_ptr + b * P + n, mask=n < P, other=0.0)
                else:
                    inv = inverse_norm(tl.sum(unit * unit, 1))
                unit = unit * inv[:, None]
            # 0 times NaN is NaN: a pixel that is not finite must not reach the other classes of the dot, only spoil its own
            finite = tl.sum(unit * 0.0, 1) == 0.0
            unit = tl.where((finite & hit)[:, None], unit, 0.0)
            spoiled += tl.sum(tl.where(finite[None, :], 0, mine), 1)
            one_hot = mine.to(x.dtype)
            high = unit.to(x.dtype)
            sums = tl.dot(one_hot, high, sums, input_precision=PRECISION)
            if NORMALIZE and x.dtype != tl.float32:
                sums = tl.dot(one_hot, (unit - high.to(tl.float32)).to(x.dtype), sums)
            if squares_ptr is not None:
                squares = tl.dot(mine.to(tl.float32), unit * unit, squares, input_precision=PRECISION)
    out = (group.to(tl.int64) * K + offs_k[:, None]) * D + offs_d[None, :]
    mask = (offs_k < K)[:, None] & mask_d[None, :]
    poison = tl.where(spoiled > 0, float("nan"), 0.0)[:, None]
    tl.store(sums_ptr + out, sums + poison, mask=mask)
    if squares_ptr is not None:
        tl.store(squares_ptr + out, squares + poison, mask=mask)
    if tl.program_id(0) % blocks_o == 0:
        tl.store(counts_ptr + group.to(tl.int64) * K + offs_k, counts, mask=offs_k < K)


def _inverse_norms(features):
    """[B, P] float32: a pass of its own, where a program cannot hold all channels."""
    batch, dim, height, width = features.shape
    inv_norm = features.new_empty(batch, height * width, dtype=torch.float32)
    launch = settings.find(architecture(features), "norms", features.dtype, dim, 1, layout(features))
    programs = batch * triton.cdiv(height * width, launch["BLOCK_N"])
    norms_kernel[(programs,)](
        features, inv_norm, height * width, dim, width, *features.stride(), is_flat(features), **launch
    )
    return inv_norm


def _launch(features, num_classes: int, squares: bool) -> dict[str, int]:
    """The table's row, cut to the channels there are: a tile that holds them all spares the pass for the norms."""
    dim = features.shape[1]
    launch = settings.find(architecture(features), "moments", features.dtype, dim, num_classes, layout(features))
    whole = max(16, power_of_two(dim))
    return launch | {"BLOCK_O": min(whole, launch["BLOCK_O"] // (2 if squares and dim > 64 else 1))}  # two accumulators


def class_moments(features, labels, num_classes, *, normalize, squares, ignore_index):
    """-> sums [K, D], counts [K] int64, squares [K, D] or empty. Contract: `backends/reference.py`.

    A pixel with a bad label is left out and raises the flag; a labelled pixel that is not finite makes its class's sums NaN.
    """
    batch, dim, height, width = features.shape
    sums = features.new_empty(num_classes, dim, dtype=torch.float32)
    square_sums = torch.empty_like(sums) if squares else sums.new_empty(0)
    if features.numel() == 0:
        return sums.zero_(), torch.zeros(num_classes, dtype=torch.int64, device=features.device), square_sums.zero_()
    launch = _launch(features, num_classes, squares)
    tiles = batch * triton.cdiv(height * width, launch["BLOCK_N"])
    blocks = triton.cdiv(num_classes, launch["BLOCK_K"]) * triton.cdiv(dim, launch["BLOCK_O"])
    per_group, groups = group_tiles(tiles, blocks, sums.numel() * (2 if squares else 1))
    partials = [
        out if groups == 1 or not out.numel() else out.new_empty(groups, num_classes, dim)
        for out in (sums, square_sums)
    ]
    counts = torch.empty(groups, num_classes, dtype=torch.int32, device=features.device)
    with on_device_of(features):
        inv_norm = _inverse_norms(features) if normalize and dim > launch["BLOCK_O"] else None
        moments_kernel[(blocks, groups)](
            features, labels, inv_norm, partials[0], partials[1] if squares else None, counts, flag(features),
            height * width, dim, num_classes, *label_arguments(labels, height, width, ignore_index), *features.stride(), tiles, per_group,
            normalize, is_flat(features), precision(features.dtype), **launch,
        )  # fmt: skip
        if groups > 1:
            for partial, out in zip(partials, (sums, square_sums), strict=True):
                if out.numel():
                    add_groups_kernel[(triton.cdiv(out.numel(), 1024),)](partial, out, out.numel(), groups, 1024)
    return sums, counts.sum(0, dtype=torch.int64), square_sums
