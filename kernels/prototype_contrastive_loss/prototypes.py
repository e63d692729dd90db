"""prototype_contrastive_loss, gradient of the prototypes:  dP_k = (1/tau) sum_n w_nk s_n x̂_n.

A program owns BLOCK_K prototypes, BLOCK_O channels and one of a fixed number of groups of pixel tiles; a second kernel adds the groups in
order. The number of groups is a function of the sizes alone, so the bits do not depend on the GPU. No atomics.
Floor: feat read once (S bytes) per block of classes, 2 N D K operations, 4 where the logits are computed again: for those, feat is read
once more per block of classes and of channels. Workspace: groups x K x D floats, at most 32 MB
(or one group). Half floats: s is divided by the tile's largest before the dot and put back after it, so that nothing underflows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..pixels import INTERPRETED, architecture, layout, power_of_two, precision, read_weights
from .logits import inverse_temperature
from .problem import features_of, is_wide
from .targets import read_pixels, read_target, saved_tile, weights_again

_PROGRAMS = 1024  # aimed at; a constant, not the GPU's size
_WORKSPACE_BYTES = 32 << 20


class GradientPartials(NamedTuple):
    """Sums of groups: of the prototypes' gradient [groups, images, K, D], of the bias' [groups, images, K]."""

    prototypes: Tensor
    bias: Tensor | None
    per_image: int | None


@triton.jit
def _inverse_denominator(grad, target):
    inverse = 1.0
    if target.plain is not None:
        denominator = tl.load(grad.denominator)
        inverse = tl.where(denominator == 0, 0.0, 1.0 / tl.where(denominator == 0, 1.0, denominator))
    return inverse


@triton.jit
def _factors(grad, weights, b, n, size, cls):
    """What a plain target's s is the product of, but the denominator: incoming gradient, class weight, pixel weight."""
    i = n // size.w
    offs = b * grad.stride_b + i.to(tl.int64) * grad.stride_h + (n - i * size.w).to(tl.int64) * grad.stride_w
    incoming = tl.load(grad.ptr + offs, mask=cls >= 0, other=0.0).to(tl.float32)
    class_weight, pixel_weight = read_weights(weights, cls, b * size.P + n)
    return incoming, class_weight, pixel_weight


@triton.jit
def _add_tile(acc, weight, coefficient, x, counted, poison, PRECISION: tl.constexpr):
    """acc + (weight * coefficient)^T x of the pixels that count; poison of the others. Half floats: the coefficient is divided by its
    largest before the dot, so that none is lost, and the sum multiplied by it; float32 goes without that second accumulator."""
    x = tl.where(counted[:, None], x, 0.0)  # 0 times an unlabelled pixel's NaN would be NaN
    if x.dtype == tl.float32:
        weight = tl.where(counted[:, None], weight * coefficient[:, None], poison[:, None])
        acc = tl.dot(tl.trans(weight), x, acc, input_precision=PRECISION)
    else:
        largest = tl.max(tl.abs(coefficient), 0)
        largest = tl.where(largest > 0, largest, 1.0)
        weight = tl.where(counted[:, None], weight * (coefficient / largest)[:, None], poison[:, None])
        acc += tl.dot(tl.trans(weight.to(x.dtype)), x, input_precision=PRECISION) * largest
    return acc


@triton.jit
def prototype_kernel(
    size, features, target, prototypes, weights, saved, grad, partials, tiles, tiles_per_group, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Axis 2 of the grid: images, where each has a gradient of its own; `tiles` are one image's then, else all images'."""
    blocks_o = tl.cdiv(size.D, BLOCK_O)
    k0 = (tl.program_id(0) // blocks_o) * BLOCK_K
    group = tl.program_id(1)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    offs_d = (tl.program_id(0) % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    image_tiles = tl.cdiv(size.P, BLOCK_N)
    inv_denominator = _inverse_denominator(grad, target)
    acc = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    bias = tl.zeros([BLOCK_K], tl.float32)
    for tile in range(group * tiles_per_group, tl.minimum((group + 1) * tiles_per_group, tiles)):
        b = (tile // image_tiles).to(tl.int64)
        if partials.per_image is not None:
            b = tl.program_id(2).to(tl.int64)
        n = (tile % image_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = n < size.P
        cls, bad = read_target(target, b, n, mask_n, size)
        if target.plain is not None:
            incoming, class_weight, pixel_weight = _factors(grad, weights, b, n, size, cls)
        pixels = saved_tile(features, target, saved, b, n, mask_n, cls, size)
        if target.plain is not None:
            s = class_weight * pixel_weight * incoming * inv_denominator
        else:
            s = read_pixels(target.scale, b, n, mask_n, size)
        coefficient = tl.where(cls >= 0, s * pixels.inv, 0.0)
        poison = tl.where(bad, float("nan"), 0.0)
        image_ptr = features.ptr + b * features.stride_b
        w, _, _, _ = weights_again(
            image_ptr, features, prototypes, target, weights, saved, pixels, k0, size,
            BLOCK_N, BLOCK_K, BLOCK_D, PRECISION,
        )  # fmt: skip
        if partials.bias is not None:
            bias += tl.sum(tl.where((cls >= 0)[:, None], w * s[:, None], 0.0) + poison[:, None], 0)
        x = tl.load(
            image_ptr + pixels.offset[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d,
            mask=mask_n[:, None] & (offs_d < size.D)[None, :],
            other=0.0,
        )
        acc = _add_tile(acc, w, coefficient, x, cls >= 0, poison, PRECISION)
    if partials.per_image is not None:
        group = group * tl.num_programs(2) + tl.program_id(2)
    first = group.to(tl.int64) * size.K
    out = partials.prototypes + (first + offs_k[:, None]) * size.D + offs_d[None, :]
    mask = (offs_k < size.K)[:, None] & (offs_d < size.D)[None, :]
    tl.store(out, acc * inverse_temperature(prototypes), mask=mask)
    if partials.bias is not None:
        if tl.program_id(0) % blocks_o == 0:
            tl.store(partials.bias + first + offs_k, bias, mask=offs_k < size.K)


@triton.jit
def add_groups_kernel(partial_ptr, out_ptr, size, groups, BLOCK: tl.constexpr):
    """partial [groups, size] -> out [size]: summed in the groups' order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, groups):
        acc += tl.load(partial_ptr + offs, mask=mask, other=0.0)
        partial_ptr += size
    tl.store(out_ptr + offs, acc, mask=mask)


def cut_to(settings: dict[str, int], dim: int) -> dict[str, int]:
    """BLOCK_O of the power of two that holds D, where that is less."""
    return settings | {"BLOCK_O": min(settings["BLOCK_O"], max(16, power_of_two(dim)))}


def group_tiles(tiles: int, blocks: int, floats: int) -> tuple[int, int]:
    """-> tiles a group, number of groups; from the sizes alone. `blocks` programs a group, `floats` of workspace a group."""
    tiles = max(1, tiles)
    groups = max(1, min(tiles, triton.cdiv(_PROGRAMS, blocks), _WORKSPACE_BYTES // (4 * floats)))
    per_group = int(triton.cdiv(tiles, 3 if INTERPRETED and tiles > 3 else groups))
    return per_group, int(triton.cdiv(tiles, per_group))


def add_groups(partial, groups: int):
    """partial [groups, ...] float32 -> [...]."""
    if groups == 1:
        return partial[0]
    out = partial.new_empty(partial.shape[1:])
    add_groups_kernel[(triton.cdiv(out.numel(), 1024),)](partial, out, out.numel(), groups, 1024)
    return out


def prototype_gradient(features, operands, per_image: bool, needs_bias: bool):
    """-> dprototypes [K, D] or [B, K, D], dbias [K] or [B, K] or None; float32."""
    grad, target, prototypes, weights, saved, size = operands
    plain = target.plain is not None and prototypes.variances is None and not (per_image or needs_bias)
    name = "contrast_prototypes" if plain else "contrast_prototypes_target"
    dtype = torch.float32 if is_wide(target) else features.dtype
    settings = cut_to(launch.settings_of(architecture(features), name, dtype, size.D, size.K, layout(features)), size.D)
    batch = features.shape[0]
    images = batch if per_image else 1
    tiles = batch // images * triton.cdiv(size.P, settings["BLOCK_N"])
    blocks = triton.cdiv(size.K, settings["BLOCK_K"]) * triton.cdiv(size.D, settings["BLOCK_O"])
    per_group, groups = group_tiles(tiles, blocks * images, images * size.K * size.D)
    partial = features.new_empty((groups, images, size.K, size.D), dtype=torch.float32)
    bias = features.new_empty((groups, images, size.K), dtype=torch.float32) if needs_bias else None
    sums = GradientPartials(partial, bias, 1 if per_image else None)
    prototype_kernel[(blocks, groups, images)](
        size, features_of(features), target, prototypes, weights, saved, grad, sums, tiles, per_group,
        precision(features.dtype), **settings,
    )  # fmt: skip
    dprototypes = add_groups(partial, groups)
    dbias = add_groups(bias, groups) if needs_bias else None
    return (dprototypes, dbias) if per_image else (dprototypes[0], None if dbias is None else dbias[0])
