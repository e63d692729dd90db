"""upsampled_cross_entropy and its gradient: cross-entropy of bilinearly up-sampled logits, which never exist.

A program is one warp; it owns 31 x `bands` low-resolution nodes of one image plus a halo of one cell on the left and above. Per window
of pixels it walks the classes twice: once for the sum of exponentials, once for the gradient, whose four corner sums stay in registers; it
then adds them to its own nodes, in a fixed order: gather, no atomics, deterministic. The corner nodes bound every logit of their cell
(bilinear is convex): no pass for the maximum, except where that bound is so far off that exponentials would underflow.
Floor: 2 exponentials per pixel and class (1 without gradient) on 16 units a SM and clock; bytes: labels as they are, low-resolution
logits, dlogits. Extra memory: the gradient, 8 bytes a program.
Shapes: logits [B, K, h, w] any strides; label [B, H, W] any strides and integer dtype; dlogits [B, K, h, w] float32 contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import (
    CELLS,
    LAUNCH,
    Corners,
    Tiling,
    columns_of,
    first_pixel,
    flat,
    grid_of,
    in_cell,
    interpolate,
    load_corners,
    logits_map,
    node_offset,
    window_of,
    window_sizes,
)
from .operands import Labels, Loss, Weights, labels_at, weights_of
from .pixels import INTERPRETED, classify, finish_kernel, flag, on_device_of, power_of_two, read_weights

_LOG2E = 1.4426950408889634
_PROGRAMS = 4 if INTERPRETED else 2048  # aimed at: fewer bands a program where the map is small
_SAFE_BITS = tl.constexpr(64.0)  # a bound this far above the true maximum still leaves float32's whole mantissa


class Scaling(NamedTuple):
    """factor = log2(e) / temperature, which logits are multiplied by; what a mean is divided by, where a gradient is formed."""

    factor: float
    inv_temperature: float
    denominator: Tensor | None


class Image(NamedTuple):
    """In a kernel: pointers to what belongs to one image, None where there is none."""

    logits: tl.tensor
    labels: tl.tensor
    pixel_weight: tl.tensor | None
    loss: tl.tensor | None
    dlogits: tl.tensor | None


class Band(NamedTuple):
    """In a kernel, of one row of cells: its index, the first pixel row beyond it, who counts its losses, which nodes are the program's."""

    index: tl.tensor
    row_end: tl.tensor
    mine: tl.tensor
    owned_node: tl.tensor
    add_top: tl.tensor
    add_bottom: tl.tensor


@triton.jit
def label_weight_kernel(labels, weights, partial_ptr, size, K, BLOCK: tl.constexpr):
    """partial [2, programs]: 0, and the sum of the class weights of a program's pixels: the mean's denominator. Reads the labels once."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    image = labels.height * labels.width
    b = offs // image
    pixel = (offs - b * image).to(tl.int32)
    i = pixel // labels.width
    j = pixel - i * labels.width
    ptrs = labels.ptr + b * labels.stride_b + i.to(tl.int64) * labels.stride_h + j.to(tl.int64) * labels.stride_w
    cls, bad = classify(tl.load(ptrs, mask=mask, other=0), labels, mask, K)
    class_weight, _ = read_weights(weights, cls, offs)
    poison = tl.where(bad, float("nan"), 0.0)
    tl.store(partial_ptr + tl.program_id(0), 0.0)
    tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(class_weight + poison, 0))


@triton.jit
def _bounds(ptr, at, K, stride_k, CELLS: tl.constexpr):
    """Per lane: the largest corner of all classes (above every logit of the cell), and how far below it the true maximum may lie."""
    top = tl.full([CELLS], -float("inf"), tl.float32)
    low = tl.full([CELLS], -float("inf"), tl.float32)
    for _ in range(0, K):
        a, b, c, d = load_corners(ptr, at)
        top = tl.maximum(top, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))
        low = tl.maximum(low, tl.minimum(tl.minimum(a, b), tl.minimum(c, d)))
        ptr += stride_k
    return top, tl.max(top - low, 0)


@triton.jit
def _largest(ptr, at, K, stride_k, y, x, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr):
    """The true maximum of each pixel's logits."""
    largest = tl.full([ROWS, COLS, CELLS], -float("inf"), tl.float32)
    for _ in range(0, K):
        a, b, c, d = load_corners(ptr, at)
        largest = tl.maximum(largest, interpolate(a, b, c, d, y, x))
        ptr += stride_k
    return largest


@triton.jit
def _lse_and_label(ptr, bound, cls, at, K, stride_k, y, x, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr):
    """log2 of the sum of 2**z over the classes, given a bound of z, and the label's z (a gather of it would need 64-bit addresses)."""
    total = tl.zeros([ROWS, COLS, CELLS], tl.float32)
    z_label = tl.zeros([ROWS, COLS, CELLS], tl.float32)
    for k in range(0, K):
        a, b, c, d = load_corners(ptr, at)
        z = interpolate(a, b, c, d, y, x)
        total += tl.exp2(z - bound)
        z_label = tl.where(cls == k, z, z_label)
        ptr += stride_k
    return bound + tl.log2(total), z_label


@triton.jit
def _add_gradient(dlogits_ptr, ptr, at, K, stride_k, cls, scale, lse, y, x, columns, band, grid, CELLS: tl.constexpr):
    """Adds the window's part of the gradient to the program's own nodes, class after class."""
    previous = tl.maximum(tl.arange(0, CELLS) - 1, 0)
    column = tl.sum(x, 0)  # x itself: its first dimension is 1
    active = cls >= 0
    add_top = band.owned_node & band.add_top
    add_bottom = band.owned_node & band.add_bottom
    for k in range(0, K):
        a, b, c, d = load_corners(ptr, at)
        p = tl.exp2(interpolate(a, b, c, d, y, x) - lse)
        g = tl.where(active, tl.where(cls == k, p - 1.0, p) * scale, 0.0)
        lower = tl.sum(g * y, 0)  # [COLS, CELLS]: the part of the cell's lower row of nodes
        upper = tl.sum(g, 0) - lower
        upper_right = tl.sum(upper * column, 0)
        lower_right = tl.sum(lower * column, 0)
        # a node's sum: the left part of its own cell and the right part of the cell before
        d_upper = tl.sum(upper, 0) - upper_right + tl.gather(upper_right, previous, 0)
        d_lower = tl.sum(lower, 0) - lower_right + tl.gather(lower_right, previous, 0)
        node = dlogits_ptr + (k * grid.h + band.index).to(tl.int64) * grid.w + columns.cells
        below = node + grid.w
        tl.store(node, tl.load(node, mask=add_top, other=0.0) + d_upper, mask=add_top)
        tl.store(below, tl.load(below, mask=add_bottom, other=0.0) + d_lower, mask=add_bottom)
        ptr += stride_k


@triton.jit
def _window(
    image, labels, weights, bounds, at, band, columns, r0, c0, gradient_scale, size, grid,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """One window of pixels of each lane's cell -> its loss and class weight, summed; and its part of the gradient, added to memory.
    size: K and the classes' stride."""
    top, gap = bounds
    K, stride_k = size
    i, j, y, x = window_of(r0, c0, band.index, columns, grid, ALIGN, ROWS, COLS)
    inside = in_cell(i, j, band.row_end, columns)
    mask = flat(inside)
    # within an image 32 bits do, and spare registers
    value = tl.load(image.labels + flat(i * labels.stride_h + j * labels.stride_w), mask=mask, other=0)
    cls, bad = classify(value, labels, mask, K)
    pixel = flat(i * grid.W + j)
    class_weight, pixel_weight = read_weights(Weights(weights.class_ptr, image.pixel_weight), cls, pixel)
    mine = flat(inside & band.mine[None, None, :])
    poison = tl.where(bad, float("nan"), 0.0)
    weight_sum = tl.sum(tl.where(mine, class_weight + poison, 0.0), 0)
    weight = tl.reshape(class_weight * pixel_weight, [ROWS, COLS, CELLS])
    cls = tl.reshape(cls, [ROWS, COLS, CELLS])

    if gap > _SAFE_BITS:
        largest = _largest(image.logits, at, K, stride_k, y, x, ROWS, COLS, CELLS)
        lse, z_label = _lse_and_label(image.logits, largest, cls, at, K, stride_k, y, x, ROWS, COLS, CELLS)
    else:
        lse, z_label = _lse_and_label(image.logits, top[None, None, :], cls, at, K, stride_k, y, x, ROWS, COLS, CELLS)
    loss = flat(tl.where(cls >= 0, weight * ((lse - z_label) * 0.6931471805599453), 0.0)) + poison
    loss_sum = tl.sum(tl.where(mine, loss, 0.0), 0)
    if image.loss is not None:
        tl.store(image.loss + pixel, loss, mask=mine)
    if image.dlogits is not None:
        scale = weight * gradient_scale
        _add_gradient(image.dlogits, image.logits, at, K, stride_k, cls, scale, lse, y, x, columns, band, grid, CELLS)
    return loss_sum, weight_sum


@triton.jit
def cross_entropy_kernel(
    logits, labels, weights, scaling, loss, dlogits_ptr, K, grid, tiling, ALIGN: tl.constexpr, HALO: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TAIL_ROWS: tl.constexpr, TAIL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """HALO 1: with gradient, the program owns nodes; 0: without, it owns cells."""
    tile = tl.program_id(0) % tiling.tiles
    strip = (tl.program_id(0) // tiling.tiles) % tiling.strips
    b = (tl.program_id(0) // (tiling.tiles * tiling.strips)).to(tl.int64)
    lane = tl.arange(0, CELLS)
    columns = columns_of(tile * (CELLS - HALO) - 1, grid, ALIGN, CELLS)
    widest = tl.max(columns.end - columns.start, 0)
    rest = widest % COLS
    full = widest - rest + tl.where(rest > TAIL, COLS, 0)  # what windows of COLS cover; a narrower one takes the rest
    owned = (lane >= HALO) | (tile == 0)
    owned_node = (lane >= HALO) & (columns.cells < grid.w)
    col0 = node_offset(columns.cells, grid.w, logits.stride_w)
    col1 = node_offset(columns.cells + 1, grid.w, logits.stride_w)
    logits_ptr = logits.ptr + b * logits.stride_b
    label_ptr = labels.ptr + b * labels.stride_b
    pixel_weight_ptr = weights.pixel_ptr
    if pixel_weight_ptr is not None:
        pixel_weight_ptr += b * grid.H * grid.W
    loss_ptr = loss.map_ptr
    if loss_ptr is not None:
        loss_ptr += b * grid.H * grid.W
    if dlogits_ptr is not None:
        dlogits_ptr += b * K * grid.h * grid.w
    image = Image(logits_ptr, label_ptr, pixel_weight_ptr, loss_ptr, dlogits_ptr)
    size = (K, logits.stride_d)
    gradient_scale = scaling.inv_temperature
    if scaling.denominator is not None:
        denominator = tl.load(scaling.denominator)
        gradient_scale *= tl.where(denominator == 0, 0.0, 1.0 / tl.where(denominator == 0, 1.0, denominator))
    loss_sum = 0.0
    weight_sum = 0.0
    first = strip * tiling.bands - 1
    for index in range(first, first + tiling.bands + HALO):
        row_start = first_pixel(index, grid.H, grid.scale_h, grid.steps, ALIGN)
        row_end = first_pixel(index + 1, grid.H, grid.scale_h, grid.steps, ALIGN)
        if (row_start < row_end) & (widest > 0) & (index < grid.h):
            row0 = node_offset(index, grid.h, logits.stride_h)
            row1 = node_offset(index + 1, grid.h, logits.stride_h)
            at = Corners(row0, row1, col0, col1, scaling.factor)
            # the halo's loss is another program's; so are the nodes outside
            mine = owned & ((index >= first + HALO) | (strip == 0))
            add_top = (index > first) & (index >= 0)
            add_bottom = (index + 1 < grid.h) & (index + 1 <= first + tiling.bands)
            band = Band(index, row_end, mine, owned_node, add_top, add_bottom)
            bounds = _bounds(logits_ptr, at, K, logits.stride_d, CELLS)
            for r0 in range(row_start, row_end, ROWS):
                for c0 in range(0, full, COLS):
                    window_loss, window_weight = _window(
                        image, labels, weights, bounds, at, band, columns, r0, c0, gradient_scale, size, grid, ALIGN, ROWS, COLS, CELLS
                    )  # fmt: skip
                    loss_sum += window_loss
                    weight_sum += window_weight
            if TAIL > 0:  # noqa: SIM102 - a constexpr: a window of no pixels must not even be compiled
                if full < widest:
                    for r0 in range(row_start, row_end, TAIL_ROWS):
                        window_loss, window_weight = _window(
                            image, labels, weights, bounds, at, band, columns, r0, full, gradient_scale, size, grid,
                            ALIGN, TAIL_ROWS, TAIL, CELLS,
                        )  # fmt: skip
                        loss_sum += window_loss
                        weight_sum += window_weight
    if loss_ptr is None:
        tl.store(loss.partial_ptr + tl.program_id(0), loss_sum)
        tl.store(loss.partial_ptr + tl.num_programs(0) + tl.program_id(0), weight_sum)


def _denominator(labels: Labels, weights: Weights, num_classes: int) -> torch.Tensor:
    """[] float32: the mean's denominator, before the loss is known: the gradient is formed already divided."""
    size = labels.ptr.numel()
    block = 256 if INTERPRETED else 4096
    programs = triton.cdiv(size, block)
    partial = torch.empty(2, programs, dtype=torch.float32, device=labels.ptr.device)
    denominator = torch.empty(2, dtype=torch.float32, device=labels.ptr.device)
    label_weight_kernel[(programs,)](labels, weights, partial, size, num_classes, block)
    finish_kernel[(1,)](partial, denominator[1:], denominator, programs, True, BLOCK=1024)
    return denominator[0]


def bands_of(images: int, tiles: int, height: int) -> int:
    """Node rows a program walks: more spare the halo, fewer make more programs."""
    bands = 1
    while bands < 8 and images * tiles * triton.cdiv(height, 2 * bands) >= _PROGRAMS:
        bands *= 2
    return bands


def upsampled_cross_entropy_forward(
    logits, labels, class_weight, pixel_weight, *, temperature, align_corners, ignore_index, reduction, needs_dlogits
):
    """-> loss, dlogits [B, K, h, w] float32 of the reduced loss (incoming gradient 1), or empty. Contract: `backends/reference.py`."""
    batch, num_classes, h, w = logits.shape
    height, width = labels.shape[1:]
    none = reduction == "none"
    loss = torch.empty(labels.shape if none else (), dtype=torch.float32, device=logits.device)
    dlogits = torch.zeros(logits.shape if needs_dlogits else 0, dtype=torch.float32, device=logits.device)
    if labels.numel() == 0:
        return loss.zero_(), dlogits
    if (height - 1) * labels.stride(1) + (width - 1) * labels.stride(2) >= 2**31:
        labels = labels.contiguous()  # a view so wide that an image's offsets pass 32 bits
    halo = int(needs_dlogits)
    tiles = triton.cdiv(w, CELLS - 1) if halo else triton.cdiv(w + 1, CELLS)
    bands = bands_of(batch, tiles, h)
    tiling = Tiling(bands, triton.cdiv(h + 1 - halo, bands), tiles)
    programs = batch * tiling.strips * tiles
    rows, cols, tail = window_sizes((h, w), (height, width), align_corners)
    tail_rows = min(8, power_of_two(-(-height // h))) if tail else 1
    target = labels_at(labels, flag(logits), height, width, ignore_index)
    weights = weights_of(class_weight, pixel_weight)
    partial = None if none else torch.empty(2, programs, dtype=torch.float32, device=logits.device)
    with on_device_of(logits):
        denominator = _denominator(target, weights, num_classes) if needs_dlogits and reduction == "mean" else None
        cross_entropy_kernel[(programs,)](
            logits_map(logits), target, weights, Scaling(_LOG2E / temperature, 1 / temperature, denominator),
            Loss(loss if none else None, partial), dlogits if needs_dlogits else None, num_classes,
            grid_of((h, w), (height, width), align_corners), tiling, align_corners, halo, rows, cols, tail_rows, tail, CELLS, **LAUNCH,
        )  # fmt: skip
        if not none:
            finish_kernel[(1,)](partial, loss, torch.empty_like(loss), programs, reduction == "mean", BLOCK=1024)
    return loss, dlogits
