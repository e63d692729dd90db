"""class_moments: per class the sum of its pixels' (unit) features, of their squares, and their number. No sort, no float atomics.

Two kernels, both of which read the features once; a third adds the groups' partial sums in order.
`moments_kernel`: a program owns BLOCK_K classes, BLOCK_O channels and one of a fixed number of groups of pixel tiles: one-hot dot, tile
after tile; tiles without a pixel of its classes are skipped unread (label maps are piecewise constant: K = 100 000 reads little more than
K = 19). The one-hot side of the dot is exact; half floats enter as x̂ = high + low, so the sums are as good as float32's.
`unit_moments_kernel`, where unit features have more than BLOCK_O channels: a norm needs all of them, so a program keeps a tile of few
pixels and all channels in registers, and adds the tile's pixels class by class to its own rows of the partial sums (K D does not fit
registers; the rows stay in L2). A row is written first where a class appears first, and only such rows are read again: label maps hold few
classes a group. Few pixels are few bytes of a channel's row (16 in float32 at 2048 channels): the rest of a sector is
read by the same program's next tiles, 32 KB later: from L1.
Floor: S bytes; 2 N D BLOCK_K operations, or 2 N D for each class of a tile.
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
from .pixels import INTERPRETED, architecture, layout, on_device_of, pixel_offset, power_of_two, precision, read_class
from .prototype_contrastive_loss.logits import inverse_norm
from .prototype_contrastive_loss.prototypes import add_groups, group_tiles

_UNIT_PROGRAMS = 512  # aimed at; a constant, not the GPU's size
_WORKSPACE_BYTES = 32 << 20


class MomentPartials(NamedTuple):
    """Sums of groups: [groups, K, D] twice, and the counts [groups, K]."""

    sums: Tensor
    squares: Tensor | None
    counts: Tensor


class SeenPartials(NamedTuple):
    """Sums of groups [groups, K, D] twice; a row is there where `seen` [groups, K], the number of its pixels, is not 0. Their weights."""

    sums: Tensor
    squares: Tensor | None
    seen: Tensor
    counts: Tensor | None


@triton.jit
def moments_kernel(
    partials, weight_ptr, features, labels, size, tiles, tiles_per_group,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """NORMALIZE: BLOCK_O holds all of D. weight_ptr [B, P]: weighted sums and counts.
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
                unit = unit * inverse_norm(tl.sum(unit * unit, 1))[:, None]
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


@triton.jit
def _add_row(ptr, offs_d, is_there, row, D):
    """row [BLOCK_D] -> memory, onto what is there. The barriers: a thread may load what another one stores."""
    mask = offs_d < D
    total = row + tl.load(ptr + offs_d, mask=mask & is_there, other=0.0)
    tl.debug_barrier()
    tl.store(ptr + offs_d, total, mask=mask)


@triton.jit
def unit_moments_kernel(
    partials, weight_ptr, features, labels, size, tiles, tiles_per_group, classes, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """BLOCK_D holds all of D. A program owns `classes` classes of one group of tiles. Zeros in partials.seen: rows not yet written."""
    group = tl.program_id(1)
    first = tl.program_id(0) * classes
    image_tiles = tl.cdiv(size.P, BLOCK_N)
    for tile in range(group * tiles_per_group, tl.minimum((group + 1) * tiles_per_group, tiles)):
        b = (tile // image_tiles).to(tl.int64)
        n = (tile % image_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        cls, _ = read_class(labels, b, n, n < size.P, size)
        cls = tl.where((cls >= first) & (cls < first + classes), cls, -1)
        k = tl.max(cls, 0)
        if k >= 0:
            # k < K adds nothing; but else the addresses of all tiles would be formed once, and kept in twice the registers of a tile
            offs_d = tl.arange(0, BLOCK_D) + tl.maximum(k - size.K + 1, 0) * BLOCK_D
            offs_n = pixel_offset(features, n, size.w)
            x = tl.load(features.ptr + b * features.stride_b + offs_n[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d,
                        mask=(n < size.P)[:, None] & (offs_d < size.D)[None, :], other=0.0)  # fmt: skip
            x = x.to(tl.float32)
            scale = inverse_norm(tl.sum(x * x, 1))
            # 0 times NaN is NaN: a pixel that is not finite must not reach the other classes, only spoil its own
            finite = tl.sum(x * 0.0, 1) == 0.0
            x = tl.where(finite[:, None], x, 0.0)
            poison = tl.where(finite, 0.0, float("nan"))
            weight = tl.full([BLOCK_N], 1.0, tl.float32)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + b * size.P + n, mask=cls >= 0, other=0.0)
            while k >= 0:
                mine = cls == k
                part = group.to(tl.int64) * size.K + k
                seen = tl.load(partials.seen + part)
                spoiled = tl.sum(tl.where(mine, poison, 0.0), 0)
                factor = tl.where(mine, scale * weight, 0.0)
                row = tl.sum(x * factor[:, None], 0) + spoiled
                _add_row(partials.sums + part * size.D, offs_d, seen > 0, row, size.D)
                if partials.squares is not None:
                    unit = x * tl.where(mine, scale, 0.0)[:, None]
                    row = tl.sum(unit * unit * weight[:, None], 0) + spoiled
                    _add_row(partials.squares + part * size.D, offs_d, seen > 0, row, size.D)
                if partials.counts is not None:
                    count = tl.load(partials.counts + part)
                    tl.debug_barrier()
                    tl.store(partials.counts + part, count + tl.sum(tl.where(mine, weight, 0.0), 0))
                tl.store(partials.seen + part, seen + tl.sum(mine.to(tl.int32), 0))
                tl.debug_barrier()
                cls = tl.where(mine, -1, cls)
                k = tl.max(cls, 0)


@triton.jit
def add_seen_kernel(partial_ptr, seen_ptr, out_ptr, K, D, groups, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """partial [groups, K, D] -> out [K, D]: the rows that are there, in a fixed order. A program owns BLOCK_D channels of one class."""
    blocks = tl.cdiv(D, BLOCK_D)
    k = tl.program_id(0) // blocks
    offs_d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, groups, BLOCK_G):
        offs_g = start + tl.arange(0, BLOCK_G)
        part = offs_g.to(tl.int64) * K + k
        there = tl.load(seen_ptr + part, mask=offs_g < groups, other=0) > 0
        rows = tl.load(
            partial_ptr + part[:, None] * D + offs_d[None, :], mask=there[:, None] & mask_d[None, :], other=0.0
        )
        acc += tl.sum(rows, 0)
    tl.store(out_ptr + k.to(tl.int64) * D + offs_d, acc, mask=mask_d)


def _settings(features, num_classes: int, squares: bool) -> dict[str, int]:
    """The table's row of `moments`, cut to the channels there are."""
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
    weight = None if problem.pixel_weight is None else problem.pixel_weight.contiguous()
    if features.numel() == 0:
        zeros = features.new_zeros(num_classes, features.shape[1], dtype=torch.float32)
        sums, counts, squares = zeros, zeros.sum(1), zeros.clone()
    else:
        with on_device_of(features):
            labels = labels_at(problem.labels, flag, *features.shape[2:], problem.ignore_index)
            moments = _unit_moments if kernel_of(problem) == "unit_moments" else _moments
            sums, counts, squares = moments(problem, weight, labels)
    counts = counts.to(torch.int64 if weight is None else torch.float32)
    return sums, counts, sums.new_empty(0) if squares is None or not problem.squares else squares


def kernel_of(problem) -> str:
    """The kernel's name in the launch table."""
    settings = _settings(problem.features, problem.num_classes, problem.squares)
    return "unit_moments" if problem.normalize and problem.features.shape[1] > settings["BLOCK_O"] else "moments"


def _moments(problem, weight: Tensor | None, labels) -> tuple[Tensor, Tensor, Tensor | None]:
    features, num_classes = problem.features, problem.num_classes
    settings = _settings(features, num_classes, problem.squares)
    size = size_of(features, num_classes)
    tiles = features.shape[0] * triton.cdiv(size.P, settings["BLOCK_N"])
    blocks = triton.cdiv(num_classes, settings["BLOCK_K"]) * triton.cdiv(size.D, settings["BLOCK_O"])
    per_group, groups = group_tiles(tiles, blocks, num_classes * size.D * (2 if problem.squares else 1))
    empty = functools.partial(torch.empty, device=features.device)
    sums = empty((groups, num_classes, size.D), dtype=torch.float32)
    squares = torch.empty_like(sums) if problem.squares else None
    counts = empty((groups, num_classes), dtype=torch.int32 if weight is None else torch.float32)
    moments_kernel[(blocks, groups)](
        MomentPartials(sums, squares, counts), weight, feature_map(features), labels, size, tiles, per_group,
        problem.normalize, precision(features.dtype), **settings,
    )  # fmt: skip
    total = counts.sum(0, dtype=torch.int64 if weight is None else torch.float64)
    return add_groups(sums, groups), total, None if squares is None else add_groups(squares, groups)


def _unit_moments(problem, weight: Tensor | None, labels) -> tuple[Tensor, Tensor, Tensor | None]:
    features, num_classes = problem.features, problem.num_classes
    size = size_of(features, num_classes)
    settings = launch.settings_of(
        architecture(features), "unit_moments", features.dtype, size.D, num_classes, layout(features)
    )
    tiles = features.shape[0] * triton.cdiv(size.P, settings["BLOCK_N"])
    floats = num_classes * size.D * (2 if problem.squares else 1)
    per_group, groups, ranges = unit_groups(tiles, floats, features.numel() * features.element_size())
    sums = features.new_empty((groups, num_classes, size.D), dtype=torch.float32)
    squares = torch.empty_like(sums) if problem.squares else None
    seen = torch.zeros(groups, num_classes, dtype=torch.int32, device=features.device)
    counts = None if weight is None else torch.zeros_like(seen, dtype=torch.float32)
    classes = triton.cdiv(num_classes, ranges)
    unit_moments_kernel[(triton.cdiv(num_classes, classes), groups)](
        SeenPartials(sums, squares, seen, counts), weight, feature_map(features), labels, size, tiles, per_group, classes,
        BLOCK_D=power_of_two(size.D), **settings,
    )  # fmt: skip
    total = seen.sum(0) if counts is None else counts.sum(0, dtype=torch.float64)
    return _add_seen(sums, seen), total, None if squares is None else _add_seen(squares, seen)


def unit_groups(tiles: int, floats: int, feature_bytes: int) -> tuple[int, int, int]:
    """-> tiles per group, groups, ranges of classes; from the sizes alone. `floats` of workspace per group: in total at most an eighth of
    the features, or 32 MB. Where that leaves few groups, their classes are shared out; a tile with classes of two ranges is read twice."""
    most = max(1, min(tiles, _UNIT_PROGRAMS, max(_WORKSPACE_BYTES, feature_bytes // 8) // (4 * floats)))
    per_group = int(triton.cdiv(tiles, min(most, 3) if INTERPRETED else most))
    return per_group, int(triton.cdiv(tiles, per_group)), max(1, min(tiles, _UNIT_PROGRAMS // 4) // most)


def _add_seen(partial: Tensor, seen: Tensor) -> Tensor:
    """partial [groups, K, D] -> [K, D]."""
    groups, num_classes, dim = partial.shape
    out = partial.new_empty(num_classes, dim)
    block = min(128, power_of_two(dim))
    add_seen_kernel[(num_classes * triton.cdiv(dim, block),)](partial, seen, out, num_classes, dim, groups, 32, block)
    return out
