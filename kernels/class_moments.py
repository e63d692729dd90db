"""class_moments: per class the sum of its pixels' (unit) features, of their squares, and their number. No sort, no float atomics.

A program owns BLOCK_K classes, BLOCK_O channels and one of a fixed number of groups of pixel tiles: one-hot dot, tile after tile; tiles
without a pixel of its classes are skipped unread (label maps are piecewise constant: K = 100 000 reads little more than K = 19). A second
kernel adds the groups in order. The one-hot side of the dot is exact; half floats enter as x̂ = high + low, so the sums are as good as
float32's. Floor: S bytes (2 S where D > BLOCK_O and normalize: the norms are a pass of their own), 2 N D BLOCK_K operations.
Shapes: feat [B, D, P] any strides; label [B, H, W]; sums, squares [K, D] float32; counts [K] int64.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .operands import feature_map, labels_at, size_of
from .pixels import architecture, layout, on_device_of, pixel_offset, power_of_two, precision, read_class, tile_of
from .prototype_contrastive_loss.logits import inverse_norm
from .prototype_contrastive_loss.prototypes import add_groups, group_tiles


class Partials(NamedTuple):
    """Sums of groups: [groups, K, D] twice, and the counts [groups, K]."""

    sums: Tensor
    squares: Tensor | None
    counts: Tensor


@triton.jit
def norms_kernel(features, inv_ptr, size, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """inv_norm [B, P] = 1 / max(|x|, 1e-12)."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = pixel_offset(features, n, size.w)
    feat_ptrs = (
        features.ptr + b * features.stride_b + offs_n[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d
    )
    step = tl.full((), BLOCK_D, tl.int64) * features.stride_d
    square = tl.zeros([BLOCK_N], tl.float32)
    for d in range(0, size.D, BLOCK_D):
        x = tl.load(feat_ptrs, mask=mask_n[:, None] & (offs_d < size.D - d)[None, :], other=0.0).to(tl.float32)
        square += tl.sum(x * x, 1)
        feat_ptrs += step
    tl.store(inv_ptr + b * size.P + n, inverse_norm(square), mask=mask_n)


@triton.jit
def moments_kernel(
    partials, weight_ptr, inv_ptr, features, labels, size, tiles, tiles_per_group,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """inv_ptr None and NORMALIZE: BLOCK_O holds all of D and the norm is formed here. weight_ptr [B, P]: weighted sums and counts.
    Pointers come first: another order takes a 129th register on sm_90, and with it half the occupancy."""
    blocks_o = tl.cdiv(size.D, BLOCK_O)
    group = tl.program_id(1)
    offs_k = (tl.program_id(0) // blocks_o) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = (tl.program_id(0) % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_d = offs_d < size.D
    image_tiles = tl.cdiv(size.P, BLOCK_N)
    sums = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    squares = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    counts = tl.zeros([BLOCK_K], partials.counts.dtype.element_ty)
    spoiled = tl.zeros([BLOCK_K], tl.int32)
    for tile in range(group * tiles_per_group, tl.minimum((group + 1) * tiles_per_group, tiles)):
        b = (tile // image_tiles).to(tl.int64)
        n = (tile % image_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        cls, _ = read_class(labels, b, n, n < size.P, size)
        mine = (offs_k[:, None] == cls[None, :]).to(tl.int32)
        hit = tl.max(mine, 0) > 0
        if tl.max(hit.to(tl.int32), 0) > 0:
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + b * size.P + n, mask=hit, other=0.0)
                counts += tl.sum(mine.to(tl.float32) * weight[None, :], 1)
            else:
                counts += tl.sum(mine, 1)
            offs_n = pixel_offset(features, n, size.w)
            # the mask of the tile's edge alone: with the labels in it, loads would be narrow
            x = tl.load(features.ptr + b * features.stride_b + offs_n[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d,
                        mask=(n < size.P)[:, None] & mask_d[None, :], other=0.0)  # fmt: skip
            unit = x.to(tl.float32)
            if NORMALIZE:
                if inv_ptr is not None:
                    inv = tl.load(inv_ptr + b * size.P + n, mask=n < size.P, other=0.0)
                else:
                    inv = inverse_norm(tl.sum(unit * unit, 1))
                unit = unit * inv[:, None]
            # 0 times NaN is NaN: a pixel that is not finite must not reach the other classes of the dot, only spoil its own
            finite = tl.sum(unit * 0.0, 1) == 0.0
            unit = tl.where((finite & hit)[:, None], unit, 0.0)
            spoiled += tl.sum(tl.where(finite[None, :], 0, mine), 1)
            value = unit
            if weight_ptr is not None:
                value = unit * weight[:, None]
            one_hot = mine.to(x.dtype)
            high = value.to(x.dtype)
            sums = tl.dot(one_hot, high, sums, input_precision=PRECISION)
            if (NORMALIZE or weight_ptr is not None) and x.dtype != tl.float32:
                sums = tl.dot(one_hot, (value - high.to(tl.float32)).to(x.dtype), sums)
            if partials.squares is not None:
                squares = tl.dot(mine.to(tl.float32), unit * value, squares, input_precision=PRECISION)
    out = (group.to(tl.int64) * size.K + offs_k[:, None]) * size.D + offs_d[None, :]
    mask = (offs_k < size.K)[:, None] & mask_d[None, :]
    poison = tl.where(spoiled > 0, float("nan"), 0.0)[:, None]
    tl.store(partials.sums + out, sums + poison, mask=mask)
    if partials.squares is not None:
        tl.store(partials.squares + out, squares + poison, mask=mask)
    if tl.program_id(0) % blocks_o == 0:
        tl.store(partials.counts + group.to(tl.int64) * size.K + offs_k, counts, mask=offs_k < size.K)


def _inverse_norms(features):
    """[B, P] float32: a pass of its own, where a program cannot hold all channels."""
    batch, dim, height, width = features.shape
    inv_norm = features.new_empty(batch, height * width, dtype=torch.float32)
    settings = launch.settings_of(architecture(features), "norms", features.dtype, dim, 1, layout(features))
    programs = batch * triton.cdiv(height * width, settings["BLOCK_N"])
    norms_kernel[(programs,)](feature_map(features), inv_norm, size_of(features, 1), **settings)
    return inv_norm


def _settings(features, num_classes: int, squares: bool) -> dict[str, int]:
    """The table's row, cut to the channels there are: a tile that holds them all spares the pass for the norms."""
    dim = features.shape[1]
    settings = launch.settings_of(architecture(features), "moments", features.dtype, dim, num_classes, layout(features))
    whole = max(16, power_of_two(dim))
    return settings | {
        "BLOCK_O": min(whole, settings["BLOCK_O"] // (2 if squares and dim > 64 else 1))
    }  # two accumulators


def class_moments(problem, flag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> sums [K, D], counts [K] (int64, or float32 of weights), squares [K, D] or [0]. problem: as the backends' `Moments`.

    A pixel with a bad label is left out and raises the flag; a labelled pixel that is not finite makes its class's sums NaN.
    """
    features, num_classes = problem.features, problem.num_classes
    batch, dim, height, width = features.shape
    weight = None if problem.pixel_weight is None else problem.pixel_weight.contiguous()
    count_dtype = torch.int64 if weight is None else torch.float32
    settings = _settings(features, num_classes, problem.squares)
    tiles = batch * triton.cdiv(height * width, settings["BLOCK_N"])
    blocks = triton.cdiv(num_classes, settings["BLOCK_K"]) * triton.cdiv(dim, settings["BLOCK_O"])
    per_group, groups = group_tiles(tiles, blocks, num_classes * dim * (2 if problem.squares else 1))
    empty = functools.partial(torch.zeros if features.numel() == 0 else torch.empty, device=features.device)
    sums = empty((groups, num_classes, dim), dtype=torch.float32)
    squares = empty((groups, num_classes, dim), dtype=torch.float32) if problem.squares else None
    counts = empty((groups, num_classes), dtype=torch.int32 if weight is None else torch.float32)
    with on_device_of(features):
        if features.numel():
            inv_norm = _inverse_norms(features) if problem.normalize and dim > settings["BLOCK_O"] else None
            moments_kernel[(blocks, groups)](
                Partials(sums, squares, counts), weight, inv_norm, feature_map(features),
                labels_at(problem.labels, flag, height, width, problem.ignore_index), size_of(features, num_classes), tiles, per_group,
                problem.normalize, precision(features.dtype), **settings,
            )  # fmt: skip
        total = add_groups(sums, groups)
        square_total = total.new_empty(0) if squares is None else add_groups(squares, groups)
    wide = counts.sum(0, dtype=torch.int64 if weight is None else torch.float64)
    return total, wide.to(count_dtype), square_total
