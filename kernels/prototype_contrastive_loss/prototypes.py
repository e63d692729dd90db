"""prototype_contrastive_loss, gradient of the prototypes:  dP_k = (1/tau) sum_n w_nk s_n x̂_n.

A program owns BLOCK_K prototypes, BLOCK_O channels and one of a fixed number of groups of pixel tiles; a second kernel adds the groups in
order. The number of groups is a function of the sizes alone, so the bits do not depend on the GPU. No atomics.
Floor: feat read once (S bytes), 2 N D K operations, 4 where the logits are computed again. Workspace: groups x K x D floats, at most 32 MB
(or one group). Half floats: s is divided by the tile's largest before the dot and put back after it, so that nothing underflows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import launch
from ..operands import feature_map
from ..pixels import INTERPRETED, architecture, layout, pixel_offset, precision, read_class, read_weights
from .forward import logits_again, softmax_of

_PROGRAMS = 1024  # aimed at; a constant, not the GPU's size
_WORKSPACE_BYTES = 32 << 20


@triton.jit
def _coefficients(grad, inv_denominator, weights, saved, b, n, mask_n, size, cls, bad):
    """-> inv_norm; s * inv_norm, what a pixel's weights are multiplied by; and its largest in the tile (1 where all are 0)."""
    i = n // size.w
    offs = b * grad.stride_b + i.to(tl.int64) * grad.stride_h + (n - i * size.w).to(tl.int64) * grad.stride_w
    given = tl.load(grad.ptr + offs, mask=cls >= 0, other=0.0).to(tl.float32)
    class_weight, pixel_weight = read_weights(weights, cls, b * size.P + n)
    inv = tl.load(saved.inv_norm + b * size.P + n, mask=mask_n, other=0.0)
    coefficient = tl.where(cls >= 0, class_weight * pixel_weight * given * inv_denominator * inv, 0.0)
    largest = tl.max(tl.abs(coefficient), 0)
    largest = tl.where(largest > 0, largest, 1.0) + tl.max(tl.where(bad, float("nan"), 0.0), 0)
    return inv, coefficient, largest


@triton.jit
def prototype_kernel(
    grad, features, labels, prototypes, weights, saved, partial_ptr, size, tiles, tiles_per_group, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    blocks_o = tl.cdiv(size.D, BLOCK_O)
    k0 = (tl.program_id(0) // blocks_o) * BLOCK_K
    group = tl.program_id(1)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    offs_d = (tl.program_id(0) % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    image_tiles = tl.cdiv(size.P, BLOCK_N)
    denominator = tl.load(grad.denominator)
    inv_denominator = tl.where(denominator == 0, 0.0, 1.0 / tl.where(denominator == 0, 1.0, denominator))
    acc = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    for tile in range(group * tiles_per_group, tl.minimum((group + 1) * tiles_per_group, tiles)):
        b = (tile // image_tiles).to(tl.int64)
        n = (tile % image_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = n < size.P
        cls, bad = read_class(labels, b, n, mask_n, size)
        lse = tl.load(saved.lse + b * size.P + n, mask=mask_n, other=0.0)
        inv, coefficient, largest = _coefficients(grad, inv_denominator, weights, saved, b, n, mask_n, size, cls, bad)
        offs_n = pixel_offset(features, n, size.w)
        image_ptr = features.ptr + b * features.stride_b
        z = logits_again(
            image_ptr,
            features,
            prototypes,
            saved,
            b,
            n,
            offs_n,
            mask_n,
            inv,
            k0,
            size,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
            PRECISION,
        )
        p = softmax_of(z, lse)
        weight = tl.where(offs_k[None, :] == cls[:, None], p - 1.0, p) * (coefficient / largest)[:, None]
        weight = tl.where((cls >= 0)[:, None] & (offs_k < size.K)[None, :], weight, 0.0)
        x = tl.load(image_ptr + offs_n[:, None] + offs_d[None, :].to(tl.int64) * features.stride_d,
                    mask=mask_n[:, None] & (offs_d < size.D)[None, :], other=0.0)  # fmt: skip
        x = tl.where((cls >= 0)[:, None], x, 0.0)  # 0 times an unlabelled pixel's NaN would be NaN
        acc += tl.dot(tl.trans(weight.to(x.dtype)), x, input_precision=PRECISION) * largest
    out = partial_ptr + (group.to(tl.int64) * size.K + offs_k[:, None]) * size.D + offs_d[None, :]
    tl.store(out, acc * prototypes.inv_temperature, mask=(offs_k < size.K)[:, None] & (offs_d < size.D)[None, :])


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


def group_tiles(tiles: int, blocks: int, floats: int) -> tuple[int, int]:
    """-> tiles a group, number of groups; from the sizes alone. `blocks` programs a group, `floats` of workspace a group."""
    groups = max(1, min(tiles, triton.cdiv(_PROGRAMS, blocks), _WORKSPACE_BYTES // (4 * floats)))
    per_group = triton.cdiv(tiles, 3 if INTERPRETED and tiles > 3 else groups)
    return per_group, triton.cdiv(tiles, per_group)


def prototype_gradient(features, dprototypes, operands) -> None:
    """Writes dprototypes [K, D] float32."""
    grad, labels, prototypes, weights, saved, size = operands
    settings = launch.find(
        architecture(features), "contrast_prototypes", features.dtype, size.D, size.K, layout(features)
    )
    tiles = features.shape[0] * triton.cdiv(size.P, settings["BLOCK_N"])
    blocks = triton.cdiv(size.K, settings["BLOCK_K"]) * triton.cdiv(size.D, settings["BLOCK_O"])
    per_group, groups = group_tiles(tiles, blocks, dprototypes.numel())
    partial = dprototypes if groups == 1 else dprototypes.new_empty(groups, *dprototypes.shape)
    prototype_kernel[(blocks, groups)](
        grad, feature_map(features), labels, prototypes, weights, saved, partial, size, tiles, per_group,
        precision(features.dtype), **settings,
    )  # fmt: skip
    if groups > 1:
        block = 1024
        add_groups_kernel[(triton.cdiv(dprototypes.numel(), block),)](
            partial, dprototypes, dprototypes.numel(), groups, block
        )
