"""Classes of several rows: a class's logit is the logsumexp or the maximum of its rows' logits.

The rows' logits [B, M, P] are kept (4 M bytes per pixel); classes [B, K, P] are pooled from them, and the loss is `target_forward_kernel`
on those. Backward: the classes' dz, then the rows' dz_m = dz_k times the row's share of its class, and from there on any given gradient.
Rows are walked class after class, in an order that is sorted on the device (a stable sort: of equals the lowest row comes first).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..operands import Given, SavedPointers, Target
from ..pixels import architecture, layout, pixel_offset, precision, tile_of
from .backward import store_temperature
from .logits import dots, inverse_norm, inverse_temperature, logits_of
from .problem import features_of, prototypes_of, sizes_of
from .targets import read_pixels, read_target, row_weights, with_margin

_PIXELS = 128


@triton.jit
def logits_kernel(
    features, prototypes, out_ptr, inv_ptr, size,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits [B, K, P] of every row, and inv_norm [B, P]."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    offs_n = pixel_offset(features, n, size.w)
    image_ptr = features.ptr + b * features.stride_b
    inv = tl.full([BLOCK_N], 1.0, tl.float32)
    for k0 in range(0, size.K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        acc, quadratic, square = dots(
            image_ptr, features.stride_d, prototypes, b, offs_n, mask_n, k0, size.K, size.D,
            BLOCK_N, BLOCK_K, BLOCK_D, NORMALIZE, PRECISION,
        )  # fmt: skip
        if NORMALIZE:
            inv = inverse_norm(square)
        scale = inv * inverse_temperature(prototypes)
        z, _, _ = logits_of(acc, quadratic, scale, b, offs_k, prototypes, size.K)
        ptrs = out_ptr + (b * size.K + offs_k[None, :]) * size.P + n[:, None]
        tl.store(ptrs, z, mask=mask_n[:, None] & (offs_k < size.K)[None, :])
    if inv_ptr is not None:
        tl.store(inv_ptr + b * size.P + n, inv, mask=mask_n)


@triton.jit
def pool_kernel(rows_ptr, order_ptr, class_ptr, out_ptr, M, size, MAXIMUM: tl.constexpr, BLOCK_N: tl.constexpr):
    """rows [B, M, P] -> out [B, K, P], which holds -inf: a class without rows stays so. class_ptr [M]: classes in the order of the walk."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for j in range(0, M):
        k = tl.load(class_ptr + j)
        z = tl.load(rows_ptr + (b * M + tl.load(order_ptr + j)) * size.P + n, mask=mask_n, other=0.0)
        new_top = tl.maximum(top, z)
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(z - base)
        top = new_top
        following = tl.load(class_ptr + j + 1, mask=j + 1 < M, other=-1)
        if following != k:
            pooled = top
            if not MAXIMUM:
                pooled = tl.where(top == -float("inf"), top, top + tl.log(total))
            tl.store(out_ptr + (b * size.K + k) * size.P + n, pooled, mask=mask_n)
            top = tl.full([BLOCK_N], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_N], tl.float32)


@triton.jit
def unpool_kernel(
    rows_ptr,
    order_ptr,
    class_ptr,
    pooled_ptr,
    dpooled_ptr,
    out_ptr,
    M,
    size,
    MAXIMUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dpooled [B, K, P] -> out [B, M, P]: times exp(row - class), or to the first row that is the maximum."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    taken = tl.zeros([BLOCK_N], tl.int32)
    for j in range(0, M):
        k = tl.load(class_ptr + j)
        row = (b * M + tl.load(order_ptr + j)) * size.P + n
        z = tl.load(rows_ptr + row, mask=mask_n, other=0.0)
        place = (b * size.K + k) * size.P + n
        pooled = tl.load(pooled_ptr + place, mask=mask_n, other=0.0)
        dpooled = tl.load(dpooled_ptr + place, mask=mask_n, other=0.0)
        if MAXIMUM:
            if j > 0:
                taken = tl.where(tl.load(class_ptr + j - 1, mask=j > 0, other=-1) == k, taken, 0)
            wins = (z == pooled) & (taken == 0)
            taken = taken | wins.to(tl.int32)
            share = wins.to(tl.float32)
        else:
            share = tl.where(pooled == -float("inf"), 0.0, tl.exp(z - pooled))
        tl.store(out_ptr + row, dpooled * share, mask=mask_n)


@triton.jit
def class_gradient_kernel(
    target, prototypes, weights, saved, logits_ptr, out_ptr, temperature_ptr, size,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz / s of given logits [B, K, P] -> out [B, K, P]; of the temperature's gradient the margin's part, which is no row's."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    cls, bad = read_target(target, b, n, mask_n, size)
    mass = read_pixels(target.mass, b, n, mask_n, size)
    lse = tl.load(saved.lse + b * size.P + n, mask=mask_n, other=0.0)
    at_label = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, size.K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask = mask_n[:, None] & (offs_k < size.K)[None, :]
        place = (b * size.K + offs_k[None, :]) * size.P + n[:, None]
        z = with_margin(tl.load(logits_ptr + place, mask=mask, other=0.0), cls, offs_k, prototypes)
        w = row_weights(
            z, lse, mass, target, weights, cls, b, n, mask_n, k0, size, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION
        )
        tl.store(out_ptr + place, w, mask=mask)
        if temperature_ptr is not None:
            at_label += tl.sum(tl.where(offs_k[None, :] == cls[:, None], w, 0.0), 1)
    if temperature_ptr is not None:
        s = read_pixels(target.scale, b, n, mask_n, size)
        cost = -prototypes.margin * inverse_temperature(prototypes) * at_label
        store_temperature(temperature_ptr, s, cost, cls, bad, prototypes)


def row_logits(problem, out, inv_norm) -> None:
    """Writes the rows' logits [B, M, P] and, unless None, inv_norm [B, P]."""
    features = problem.features
    size = sizes_of(features, problem.prototypes.shape[-2])
    row = "contrast_forward_target" if problem.variances is None else "contrast_forward_variances"
    settings = launch.settings_of(architecture(features), row, features.dtype, size.D, size.K, layout(features))
    programs = features.shape[0] * triton.cdiv(size.P, settings["BLOCK_N"])
    logits_kernel[(programs,)](
        features_of(features),
        prototypes_of(problem),
        out,
        inv_norm,
        size,
        problem.normalize,
        precision(features.dtype),
        **settings,
    )


def pool(problem, rows):
    """rows [B, M, P] -> [B, K, P], and the walk: order and classes [M]."""
    features = problem.features
    size = sizes_of(features, problem.num_classes)
    order = torch.argsort(problem.prototype_class, stable=True)
    classes = problem.prototype_class[order]
    pooled = torch.full((features.shape[0], size.K, size.P), -torch.inf, device=features.device)
    programs = features.shape[0] * triton.cdiv(size.P, _PIXELS)
    pool_kernel[(programs,)](rows, order, classes, pooled, len(order), size, problem.pool == "max", _PIXELS)
    return pooled, (order, classes)


def unpool(problem, rows, pooled, walk, dpooled):
    """dpooled [B, K, P] -> [B, M, P]."""
    size = sizes_of(problem.features, problem.num_classes)
    out = torch.empty_like(rows)
    programs = rows.shape[0] * triton.cdiv(size.P, _PIXELS)
    unpool_kernel[(programs,)](rows, *walk, pooled, dpooled, out, len(walk[0]), size, problem.pool == "max", _PIXELS)
    return out


def pooled_logits(contrast, saved: SavedPointers):
    """The classes' logits [B, K, P]; leaves the rows' and inv_norm to `saved`, where there is one."""
    features = contrast.features
    rows = saved.logits
    if rows is None:
        shape = (features.shape[0], contrast.prototypes.shape[-2], features.shape[2] * features.shape[3])
        rows = features.new_empty(shape, dtype=torch.float32)
    row_logits(contrast, rows, saved.inv_norm)
    return pool(contrast, rows)[0]


def given_rows(contrast, target: Target, weights, saved: SavedPointers, wanted) -> tuple[Target, Tensor | None]:
    """-> the gradient of the rows' logits, from the loss on the pooled ones; and what the margin adds to the temperature's gradient.
    target: with scale and mass."""
    features = contrast.features
    size = sizes_of(features, contrast.num_classes)
    pooled, walk = pool(contrast, saved.logits)
    dpooled = torch.empty_like(pooled)
    settings = launch.settings_of(
        architecture(features), "contrast_forward_target", features.dtype, size.D, size.K, layout(features)
    )
    programs = features.shape[0] * triton.cdiv(size.P, settings["BLOCK_N"])
    with_margin_of = wanted.temperature and contrast.margin != 0
    partial = features.new_empty(programs, dtype=torch.float32) if with_margin_of else None
    class_gradient_kernel[(programs,)](
        target,
        prototypes_of(contrast),
        weights,
        saved,
        pooled,
        dpooled,
        partial,
        size,
        precision(features.dtype),
        **settings,
    )
    rows = unpool(contrast, saved.logits, pooled, walk, dpooled)
    return target._replace(labels=None, given=Given(rows, None)), partial
