"""A window of the up-sampled losses with any target: smoothed labels, soft ones, a sigmoid for each class, focal.

q_k = w_k (keep t_k + share),   m = sum_k q_k
softmax  loss = m lse(z) - sum_k q_k z_k,               dz_k = m p_k - q_k;      two walks over the classes
binary   loss = sum_k w_k log(1 + exp(z_k)) - q_k z_k,  dz_k = w_k sigmoid(z_k) - q_k;      one walk
focal    with s = z_k, or -z_k at the label: loss = sum_k w_k sigmoid(s)^gamma log(1 + exp(s))
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cells import flat, in_cell, interpolate, load_corners, source, window_of
from .operands import Weights
from .pixels import classify, read_weights, softplus
from .windows import LOWEST, add_to_nodes, added, is_masked, largest_of

_SAFE_BITS = tl.constexpr(64.0)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _axis(pixel, size, scale, ALIGN: tl.constexpr):
    """Of an output pixel: the nodes below and above it and the weight of the upper one, as F.interpolate has them."""
    position = tl.maximum(source(pixel, scale, ALIGN), 0.0)
    lower = tl.minimum(position.to(tl.int32), size - 1)
    return lower, tl.minimum(lower + 1, size - 1), tl.minimum(tl.maximum(position - lower.to(tl.float32), 0.0), 1.0)


@triton.jit
def _soft_target(ptr, map, rows, cols, mask, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr):
    """[ROWS, COLS, CELLS] of one class of a map with a grid of its own."""
    i0, i1, y = rows
    j0, j1, x = cols
    a = tl.load(ptr + flat(i0 * map.stride_h + j0 * map.stride_w), mask=mask, other=0.0).to(tl.float32)
    b = tl.load(ptr + flat(i0 * map.stride_h + j1 * map.stride_w), mask=mask, other=0.0).to(tl.float32)
    c = tl.load(ptr + flat(i1 * map.stride_h + j0 * map.stride_w), mask=mask, other=0.0).to(tl.float32)
    d = tl.load(ptr + flat(i1 * map.stride_h + j1 * map.stride_w), mask=mask, other=0.0).to(tl.float32)
    a, b = tl.reshape(a, [ROWS, COLS, CELLS]), tl.reshape(b, [ROWS, COLS, CELLS])
    c, d = tl.reshape(c, [ROWS, COLS, CELLS]), tl.reshape(d, [ROWS, COLS, CELLS])
    top = a + x * (b - a)
    return top + y * (c + x * (d - c) - top)


@triton.jit
def _target(image, target, cls, k, rows, cols, mask, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr):
    if target.soft is not None:
        ptr = image.soft + (tl.full((), 0, tl.int64) + k) * target.soft.map.stride_d
        t = _soft_target(ptr, target.soft.map, rows, cols, mask, ROWS, COLS, CELLS)
    else:
        t = (cls == k).to(tl.float32)
    return t


@triton.jit
def _aimed(image, target, cls, k, rows, cols, mask, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr):
    """keep t_k + share."""
    return target.keep * _target(image, target, cls, k, rows, cols, mask, ROWS, COLS, CELLS) + target.share


@triton.jit
def _class_weight(weights, k):
    w = 1.0
    if weights.class_ptr is not None:
        w = tl.load(weights.class_ptr + k)
    return w


@triton.jit
def _binary(z, own, w, gamma):
    """Of one class -> loss, dz. z in natural units; own: where it is the label's."""
    s = tl.where(own, -z, z)
    cost = softplus(s)
    wrong = tl.sigmoid(s)
    modulation = w
    if gamma is not None:
        modulation *= tl.exp(-gamma * softplus(-s))  # sigmoid(s)^gamma
    slope = modulation * wrong
    if gamma is not None:
        slope += modulation * (gamma * (1.0 - wrong) * cost)
    return modulation * cost, tl.where(own, -slope, slope)


@triton.jit
def _softmax_walk(
    image,
    terms,
    bound,
    is_low,
    at,
    cls,
    rows,
    cols,
    mask,
    y,
    x,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """-> sum of 2**((z - bound) factor), NaN where all classes are -inf; sum of q; sum of q (z - bound)."""
    target = terms.target
    total = tl.zeros([ROWS, COLS, CELLS], tl.float32)
    mass = tl.zeros([ROWS, COLS, CELLS], tl.float32)
    dot = tl.zeros([ROWS, COLS, CELLS], tl.float32)
    lost_total, lost_mass, lost_dot = total, mass, dot
    ptr = image.logits
    for k in range(0, terms.K):
        a, b, c, d = load_corners(ptr, at)
        z = interpolate(a, b, c, d, y, x) - bound
        q = _class_weight(terms.weights, k) * _aimed(image, target, cls, k, rows, cols, mask, ROWS, COLS, CELLS)
        total, lost_total = added(total, lost_total, tl.exp2(z * terms.scaling.factor))
        mass, lost_mass = added(mass, lost_mass, q)
        part = tl.where(q == 0, 0.0, q * z)
        if is_low:
            part = tl.where((q != 0) & is_masked(ptr, at, y, x), -float("inf"), part)
        dot, lost_dot = added(dot, lost_dot, part)
        ptr += terms.stride_k
    if is_low:
        total = tl.where((dot == -float("inf")) & (bound < LOWEST), float("nan"), total)
    return total, mass, dot


@triton.jit
def target_window(
    image, terms, bounds, at, band, columns, r0, c0, grid, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """As `plain_window`, for any target."""
    target = terms.target
    top, gap = bounds
    i, j, y, x = window_of(r0, c0, band.index, columns, grid, ALIGN, ROWS, COLS)
    inside = in_cell(i, j, band.row_end, columns)
    mask = flat(inside)
    pixel = flat(i * grid.W + j)
    bad = mask & (mask == 0)
    rows = (i, i, y)
    cols = (j, j, x)
    if target.labels is not None:
        value = tl.load(
            image.labels + flat(i * target.labels.stride_h + j * target.labels.stride_w), mask=mask, other=0
        )
        cls, bad = classify(value, target.labels, mask, terms.K)
    else:
        rows = _axis(i, target.soft.height, target.soft.scale_h, ALIGN)
        cols = _axis(j, target.soft.width, target.soft.scale_w, ALIGN)
        there = _soft_target(image.any, target.soft.any, rows, cols, mask, ROWS, COLS, CELLS)
        cls = tl.where(mask & (flat(there) > 0), 0, -1)
    wide = tl.reshape(cls, [ROWS, COLS, CELLS])
    column = tl.sum(x, 0)  # x itself: its first dimension is 1
    class_weight, pixel_weight = read_weights(Weights(terms.weights.class_ptr, image.pixel_weight), cls, pixel)
    counted = (cls >= 0).to(tl.float32)
    scale = tl.reshape(pixel_weight, [ROWS, COLS, CELLS]) * terms.gradient_scale
    value = tl.zeros([ROWS, COLS, CELLS], tl.float32)
    is_low = gap * terms.scaling.factor > _SAFE_BITS
    if target.binary is not None:
        lost = value
        ptr = image.logits
        for k in range(0, terms.K):
            a, b, c, d = load_corners(ptr, at)
            z = interpolate(a, b, c, d, y, x) * terms.scaling.inv_temperature
            w = _class_weight(terms.weights, k)
            q = _aimed(image, target, wide, k, rows, cols, mask, ROWS, COLS, CELLS)
            if target.hard is not None:
                loss, dz = _binary(z, wide == k, w, target.gamma)
            else:
                loss, dz = w * (softplus(z) - tl.where(q == 0, 0.0, q * z)), w * (tl.sigmoid(z) - q)
            if is_low:
                costly = (q != 0) & (z == z) & is_masked(ptr, at, y, x)  # NaN stays
                loss = tl.where(costly, float("inf") * w, loss)
            value, lost = added(value, lost, loss)
            if image.dlogits is not None:
                add_to_nodes(
                    image.dlogits, tl.where(wide >= 0, dz * scale, 0.0), k, y, column, columns, band, grid, CELLS
                )
            ptr += terms.stride_k
    else:
        bound = tl.zeros([ROWS, COLS, CELLS], tl.float32) + top[None, None, :]
        if is_low:
            bound = largest_of(image.logits, at, terms.K, terms.stride_k, y, x, ROWS, COLS, CELLS)
        total, mass, dot = _softmax_walk(
            image, terms, bound, is_low, at, wide, rows, cols, mask, y, x, ROWS, COLS, CELLS
        )
        bits = tl.log2(total)
        value = mass * (bits * _LN2) - dot * terms.scaling.inv_temperature
        if target.labels is not None:
            counted = class_weight
        if image.dlogits is not None:
            ptr = image.logits
            for k in range(0, terms.K):
                a, b, c, d = load_corners(ptr, at)
                p = tl.exp2((interpolate(a, b, c, d, y, x) - bound) * terms.scaling.factor - bits)
                q = _class_weight(terms.weights, k) * _aimed(
                    image, target, wide, k, rows, cols, mask, ROWS, COLS, CELLS
                )
                g = tl.where(wide >= 0, (mass * p - q) * scale, 0.0)
                add_to_nodes(image.dlogits, g, k, y, column, columns, band, grid, CELLS)
                ptr += terms.stride_k
    mine = flat(inside & band.mine[None, None, :])
    poison = tl.where(bad, float("nan"), 0.0)
    weight_sum = tl.sum(tl.where(mine, counted + poison, 0.0), 0)
    loss = tl.where(flat(wide) >= 0, pixel_weight * flat(value), 0.0) + poison
    if image.loss is not None:
        tl.store(image.loss + pixel, loss, mask=mine)
    return tl.sum(tl.where(mine, loss, 0.0), 0), weight_sum
