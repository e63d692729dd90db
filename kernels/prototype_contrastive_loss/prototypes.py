"""prototype_contrastive_loss, gradient of the prototypes:  dP_k = (1/tau) sum_n w_nk s_n x̂_n.

A program owns BLOCK_K prototypes, BLOCK_O channels and one of a fixed number of groups of pixel tiles; a second kernel adds the groups in
order. The number of groups is a function of the sizes alone, so the bits do not depend on the GPU. No atomics.
Floor: feat read once (S bytes), 2 N D K operations, 4 where the logits are computed again. Workspace: groups x K x D floats, at most 32 MB
(or one group). Half floats: s is divided by the tile's largest before the dot and put back after it, so that nothing underflows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import launch as settings
from ..pixels import (
    INTERPRETED,
    architecture,
    class_and_pixel_weight,
    flag,
    is_flat,
    layout,
    pixel_offset,
    precision,
    read_class,
)
from .forward import dots, softmax_of

_PROGRAMS = 1024  # aimed at; a constant, not the GPU's size
_WORKSPACE_BYTES = 32 << 20


@triton.jit
def prototype_kernel(
    grad_ptr, feat_ptr, label_ptr, proto_ptr, class_weight_ptr, pixel_weight_ptr, lse_ptr, inv_ptr, logits_ptr, denominator_ptr,
    partial_ptr, flag_ptr, P, D, K, w, H, W, scale_h, scale_w, label_b, label_h, label_w, ignore_index,
    stride_b, stride_d, stride_h, stride_w, grad_b, grad_h, grad_w, inv_temperature, tiles, tiles_per_group,
    FLAT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    blocks_o = tl.cdiv(D, BLOCK_O)
    k0 = (tl.program_id(0) // blocks_o) * BLOCK_K
    group = tl.program_id(1)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    offs_d = (tl.program_id(0) % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    image_tiles = tl.cdiv(P, BLOCK_N)
    denominator = tl.load(denominator_ptr)
    inv_denominator = tl.where(denominator == 0, 0.0, 1.0 / tl.where(denominator == 0, 1.0, denominator))
    acc = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    for tile in range(group * tiles_per_group, tl.minimum((group + 1) * tiles_per_group, tiles)):
        b = (tile // image_tiles).to(tl.int64)
        n = (tile % image_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = n < P
        cls, bad = read_class(
            label_ptr, flag_ptr, b, n, mask_n, w, H, W, scale_h, scale_w, label_b, label_h, label_w, ignore_index, K
        )
        i = n // w
        offs_grad = b * grad_b + i.to(tl.int64) * grad_h + (n - i * w).to(tl.int64) * grad_w
        grad = tl.load(grad_ptr + offs_grad, mask=cls >= 0, other=0.0).to(tl.float32)
        class_weight, pixel_weight = class_and_pixel_weight(class_weight_ptr, pixel_weight_ptr, cls, b * P + n)
        lse = tl.load(lse_ptr + b * P + n, mask=mask_n, other=0.0)
        inv = tl.load(inv_ptr + b * P + n, mask=mask_n, other=0.0)
        coefficient = tl.where(cls >= 0, class_weight * pixel_weight * grad * inv_denominator * inv, 0.0)
        largest = tl.max(tl.abs(coefficient), 0)
        largest = tl.where(largest > 0, largest, 1.0) + tl.max(tl.where(bad, float("nan"), 0.0), 0)

        offs_n = pixel_offset(n, w, stride_h, stride_w, FLAT)
        image_ptr = feat_ptr + b * stride_b
        if logits_ptr is not None:
            z = tl.load(
                logits_ptr + (b * K + offs_k[None, :]) * P + n[:, None],
                mask=mask_n[:, None] & (offs_k < K)[None, :],
                other=0.0,
            )
        else:
            z, _ = dots(
                image_ptr, proto_ptr, offs_n, mask_n, k0, K, D, stride_d, BLOCK_N, BLOCK_K, BLOCK_D, False, PRECISION
            )
            z = z * (inv * inv_temperature)[:, None]
        p = softmax_of(z, lse)
        weight = tl.where(offs_k[None, :] == cls[:, None], p - 1.0, p) * (coefficient / largest)[:, None]
        weight = tl.where((cls >= 0)[:, None] & (offs_k < K)[None, :], weight, 0.0)
        x = tl.load(image_ptr + offs_n[:, None] + offs_d[None, :].to(tl.int64) * stride_d,
                    mask=mask_n[:, None] & (offs_d < D)[None, :], other=0.0)  # fmt: skip
        x = tl.where((cls >= 0)[:, None], x, 0.0)  # 0 times an unlabelled pixel's NaN would be NaN
        acc += tl.dot(tl.trans(weight.to(x.dtype)), x, input_precision=PRECISION) * largest
    out = partial_ptr + (group.to(tl.int64) * K + offs_k[:, None]) * D + offs_d[None, :]
    tl.store(out, acc * inv_temperature, mask=(offs_k < K)[:, None] & (offs_d < D)[None, :])


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


def prototype_gradient(dprototypes, grad_loss, features, tensors, logits, numbers, inv_temperature) -> None:
    """Writes dprototypes [K, D] float32. `tensors` and `numbers` as `contrast_backward` has them."""
    pixels, dim, num_classes = numbers[:3]
    launch = settings.find(
        architecture(features), "contrast_prototypes", features.dtype, dim, num_classes, layout(features)
    )
    tiles = features.shape[0] * triton.cdiv(pixels, launch["BLOCK_N"])
    blocks = triton.cdiv(num_classes, launch["BLOCK_K"]) * triton.cdiv(dim, launch["BLOCK_O"])
    per_group, groups = group_tiles(tiles, blocks, dprototypes.numel())
    partial = dprototypes if groups == 1 else dprototypes.new_empty(groups, num_classes, dim)
    grad_strides = grad_loss.stride() if grad_loss.dim() else (0, 0, 0)
    *inputs, denominator = tensors
    prototype_kernel[(blocks, groups)](
        grad_loss, *inputs, logits, denominator, partial, flag(features), *numbers, *features.stride(), *grad_strides, inv_temperature,
        tiles, per_group, is_flat(features), precision(features.dtype), **launch,
    )  # fmt: skip
    if groups > 1:
        block = 1024
        add_groups_kernel[(triton.cdiv(dprototypes.numel(), block),)](
            partial, dprototypes, dprototypes.numel(), groups, block
        )
