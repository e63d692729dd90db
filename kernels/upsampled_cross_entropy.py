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

import torch
import triton
import triton.language as tl

from .cells import CELLS, LAUNCH, axis_scale, first_pixel, flat, interpolate, load_corners, upper_weight, window
from .pixels import INTERPRETED, class_and_pixel_weight, classify, finish_kernel, flag, on_device_of, power_of_two

_LOG2E = 1.4426950408889634
_PROGRAMS = 4 if INTERPRETED else 2048  # aimed at: fewer bands a program where the map is small
_SAFE_BITS = tl.constexpr(64.0)  # a bound this far above the true maximum still leaves float32's whole mantissa


@triton.jit
def label_weight_kernel(label_ptr, class_weight_ptr, partial_ptr, flag_ptr, size, HW, W, label_b, label_h, label_w, ignore_index, K,
                        BLOCK: tl.constexpr):  # fmt: skip
    """partial [2, programs]: 0, and the sum of the class weights of a program's pixels: the mean's denominator. Reads the labels once."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    b = offs // HW
    pixel = (offs - b * HW).to(tl.int32)
    i = pixel // W
    ptrs = label_ptr + b * label_b + i.to(tl.int64) * label_h + (pixel - i * W).to(tl.int64) * label_w
    cls, bad = classify(tl.load(ptrs, mask=mask, other=0), flag_ptr, mask, ignore_index, K)
    class_weight, _ = class_and_pixel_weight(class_weight_ptr, None, cls, offs)
    tl.store(partial_ptr + tl.program_id(0), 0.0)
    tl.store(
        partial_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(class_weight + tl.where(bad, float("nan"), 0.0), 0)
    )


@triton.jit
def _bounds(logits_ptr, factor, K, stride_k, row0, row1, col0, col1, CELLS: tl.constexpr):
    """Per lane: the largest corner of all classes (above every logit of the cell), and how far below it the true maximum may lie."""
    top = tl.full([CELLS], -float("inf"), tl.float32)
    low = tl.full([CELLS], -float("inf"), tl.float32)
    for _ in range(0, K):
        a, b, c, d = load_corners(logits_ptr, factor, row0, row1, col0, col1)
        top = tl.maximum(top, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))
        low = tl.maximum(low, tl.minimum(tl.minimum(a, b), tl.minimum(c, d)))
        logits_ptr += stride_k
    return top, tl.max(top - low, 0)


@triton.jit
def _largest(
    ptr, factor, K, stride_k, row0, row1, col0, col1, y, x, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr
):
    """The true maximum of each pixel's logits."""
    largest = tl.full([ROWS, COLS, CELLS], -float("inf"), tl.float32)
    for _ in range(0, K):
        a, b, c, d = load_corners(ptr, factor, row0, row1, col0, col1)
        largest = tl.maximum(largest, interpolate(a, b, c, d, y, x))
        ptr += stride_k
    return largest


@triton.jit
def _lse_and_label(ptr, bound, cls, factor, K, stride_k, row0, row1, col0, col1, y, x,
                   ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    """log2 of the sum of 2**z over the classes, given a bound of z, and the label's z (a gather of it would need 64-bit addresses)."""
    total = tl.zeros([ROWS, COLS, CELLS], tl.float32)
    z_label = tl.zeros([ROWS, COLS, CELLS], tl.float32)
    for k in range(0, K):
        a, b, c, d = load_corners(ptr, factor, row0, row1, col0, col1)
        z = interpolate(a, b, c, d, y, x)
        total += tl.exp2(z - bound)
        z_label = tl.where(cls == k, z, z_label)
        ptr += stride_k
    return bound + tl.log2(total), z_label


@triton.jit
def _window(
    logits_ptr, label_ptr, class_weight_ptr, pixel_weight_ptr, loss_ptr, dlogits_ptr, flag_ptr,
    top, gap, band, cells, col_start, col_end, row_end, r0, c0, owned, owned_node, inv_denominator,
    K, h, w, H, W, scale_h, scale_w, stride_k, row0, row1, col0, col1, label_h, label_w, ignore_index,
    factor, inv_temperature, add_top, add_bottom,
    ALIGN: tl.constexpr, NONE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """One window of pixels of each lane's cell -> its loss and class weight, summed; and its part of the gradient, added to memory."""
    i = (r0 + tl.arange(0, ROWS))[:, None, None]
    j = (col_start + c0)[None, None, :] + tl.arange(0, COLS)[None, :, None]
    inside = (i < row_end) & (j < col_end[None, None, :])
    y = upper_weight(i, tl.full([1, 1, 1], 0, tl.int32) + band, h, scale_h, ALIGN)
    x = upper_weight(j, cells[None, None, :], w, scale_w, ALIGN)
    mask = flat(inside)
    value = tl.load(
        label_ptr + flat(i * label_h + j * label_w), mask=mask, other=0
    )  # within an image 32 bits do, and spare registers
    cls, bad = classify(value, flag_ptr, mask, ignore_index, K)
    pixel = flat(i * W + j)
    class_weight, pixel_weight = class_and_pixel_weight(class_weight_ptr, pixel_weight_ptr, cls, pixel)
    mine = flat(inside & owned[None, None, :])
    poison = tl.where(bad, float("nan"), 0.0)
    weight_sum = tl.sum(tl.where(mine, class_weight + poison, 0.0), 0)
    weight = tl.reshape(class_weight * pixel_weight, [ROWS, COLS, CELLS])
    cls = tl.reshape(cls, [ROWS, COLS, CELLS])
    active = cls >= 0

    if gap > _SAFE_BITS:
        largest = _largest(logits_ptr, factor, K, stride_k, row0, row1, col0, col1, y, x, ROWS, COLS, CELLS)
        lse, z_label = _lse_and_label(
            logits_ptr, largest, cls, factor, K, stride_k, row0, row1, col0, col1, y, x, ROWS, COLS, CELLS
        )
    else:
        bound = top[None, None, :]
        lse, z_label = _lse_and_label(
            logits_ptr, bound, cls, factor, K, stride_k, row0, row1, col0, col1, y, x, ROWS, COLS, CELLS
        )
    loss = flat(tl.where(active, weight * ((lse - z_label) * 0.6931471805599453), 0.0)) + poison
    loss_sum = tl.sum(tl.where(mine, loss, 0.0), 0)
    if NONE:
        tl.store(loss_ptr + pixel, loss, mask=mine)
    if dlogits_ptr is not None:
        scale = weight * (inv_denominator * inv_temperature)
        previous = tl.maximum(tl.arange(0, CELLS) - 1, 0)
        column = tl.sum(x, 0)  # x itself: its first dimension is 1
        ptr = logits_ptr
        for k in range(0, K):
            a, b_, c, d = load_corners(ptr, factor, row0, row1, col0, col1)
            p = tl.exp2(interpolate(a, b_, c, d, y, x) - lse)
            g = tl.where(active, tl.where(cls == k, p - 1.0, p) * scale, 0.0)
            lower = tl.sum(g * y, 0)  # [COLS, CELLS]: the part of the cell's lower row of nodes
            upper = tl.sum(g, 0) - lower
            upper_right = tl.sum(upper * column, 0)
            lower_right = tl.sum(lower * column, 0)
            # a node's sum: the left part of its own cell and the right part of the cell before
            d_upper = tl.sum(upper, 0) - upper_right + tl.gather(upper_right, previous, 0)
            d_lower = tl.sum(lower, 0) - lower_right + tl.gather(lower_right, previous, 0)
            node = dlogits_ptr + (k * h + band).to(tl.int64) * w + cells
            tl.store(node, tl.load(node, mask=owned_node & add_top, other=0.0) + d_upper, mask=owned_node & add_top)
            tl.store(
                node + w,
                tl.load(node + w, mask=owned_node & add_bottom, other=0.0) + d_lower,
                mask=owned_node & add_bottom,
            )
            ptr += stride_k
    return loss_sum, weight_sum


@triton.jit
def cross_entropy_kernel(
    logits_ptr, label_ptr, class_weight_ptr, pixel_weight_ptr, denominator_ptr, loss_ptr, dlogits_ptr, partial_ptr, flag_ptr,
    K, h, w, H, W, scale_h, scale_w, stride_b, stride_k, stride_h, stride_w, label_b, label_h, label_w, ignore_index,
    factor, inv_temperature, bands, strips, tiles, steps,
    ALIGN: tl.constexpr, NONE: tl.constexpr, HALO: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TAIL_ROWS: tl.constexpr, TAIL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """factor = log2(e) / temperature. HALO 1: with gradient, the program owns nodes; 0: without, it owns cells."""
    tile = tl.program_id(0) % tiles
    strip = (tl.program_id(0) // tiles) % strips
    b = (tl.program_id(0) // (tiles * strips)).to(tl.int64)
    lane = tl.arange(0, CELLS)
    cells = tile * (CELLS - HALO) - 1 + lane
    col_start = first_pixel(cells, W, scale_w, steps, ALIGN)
    col_end = first_pixel(cells + 1, W, scale_w, steps, ALIGN)
    widest = tl.max(col_end - col_start, 0)
    rest = widest % COLS
    full = widest - rest + tl.where(rest > TAIL, COLS, 0)  # what windows of COLS cover; a narrower one takes the rest
    owned = (lane >= HALO) | (tile == 0)
    owned_node = (lane >= HALO) & (cells < w)
    col0 = tl.minimum(tl.maximum(cells, 0), w - 1).to(tl.int64) * stride_w
    col1 = tl.minimum(tl.maximum(cells + 1, 0), w - 1).to(tl.int64) * stride_w
    logits_ptr += b * stride_b
    label_ptr += b * label_b
    if pixel_weight_ptr is not None:
        pixel_weight_ptr += b * H * W
    if NONE:
        loss_ptr += b * H * W
    if dlogits_ptr is not None:
        dlogits_ptr += b * K * h * w
    inv_denominator = 1.0
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr)
        inv_denominator = tl.where(denominator == 0, 0.0, 1.0 / tl.where(denominator == 0, 1.0, denominator))
    loss_sum = 0.0
    weight_sum = 0.0
    first = strip * bands - 1
    for band in range(first, first + bands + HALO):
        row_start = first_pixel(band, H, scale_h, steps, ALIGN)
        row_end = first_pixel(band + 1, H, scale_h, steps, ALIGN)
        if (row_start < row_end) & (widest > 0) & (band < h):
            row0 = tl.minimum(tl.maximum(band, 0), h - 1).to(tl.int64) * stride_h
            row1 = tl.minimum(tl.maximum(band + 1, 0), h - 1).to(tl.int64) * stride_h
            # the halo's loss is another program's; so are the nodes outside
            mine = owned & ((band >= first + HALO) | (strip == 0))
            add_top = (band > first) & (band >= 0)
            add_bottom = (band + 1 < h) & (band + 1 <= first + bands)
            top, gap = _bounds(logits_ptr, factor, K, stride_k, row0, row1, col0, col1, CELLS)
            for r0 in range(row_start, row_end, ROWS):
                for c0 in range(0, full, COLS):
                    loss, weight = _window(
                        logits_ptr, label_ptr, class_weight_ptr, pixel_weight_ptr, loss_ptr, dlogits_ptr, flag_ptr,
                        top, gap, band, cells, col_start, col_end, row_end, r0, c0, mine, owned_node, inv_denominator,
                        K, h, w, H, W, scale_h, scale_w, stride_k, row0, row1, col0, col1, label_h, label_w, ignore_index,
                        factor, inv_temperature, add_top, add_bottom, ALIGN, NONE, ROWS, COLS, CELLS,
                    )  # fmt: skip
                    loss_sum += loss
                    weight_sum += weight
            if TAIL > 0:  # noqa: SIM102 - a constexpr: a window of no pixels must not even be compiled
                if full < widest:
                    for r0 in range(row_start, row_end, TAIL_ROWS):
                        loss, weight = _window(
                            logits_ptr, label_ptr, class_weight_ptr, pixel_weight_ptr, loss_ptr, dlogits_ptr, flag_ptr,
                            top, gap, band, cells, col_start, col_end, row_end, r0, full, mine, owned_node, inv_denominator,
                            K, h, w, H, W, scale_h, scale_w, stride_k, row0, row1, col0, col1, label_h, label_w, ignore_index,
                            factor, inv_temperature, add_top, add_bottom, ALIGN, NONE, TAIL_ROWS, TAIL, CELLS,
                        )  # fmt: skip
                        loss_sum += loss
                        weight_sum += weight
    if not NONE:
        tl.store(partial_ptr + tl.program_id(0), loss_sum)
        tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), weight_sum)


def _denominator(labels, class_weight, num_classes, ignore_index):
    """[] float32: the mean's denominator, before the loss is known: the gradient is formed already divided."""
    size = labels.numel()
    block = 256 if INTERPRETED else 4096
    programs = triton.cdiv(size, block)
    partial = torch.empty(2, programs, dtype=torch.float32, device=labels.device)
    denominator = torch.empty(2, dtype=torch.float32, device=labels.device)
    label_weight_kernel[(programs,)](
        labels, class_weight, partial, flag(labels), size, labels.shape[1] * labels.shape[2], labels.shape[2], *labels.stride(),
        ignore_index, num_classes, block,
    )  # fmt: skip
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
    class_weight, pixel_weight = (
        None if weight is None else weight.contiguous() for weight in (class_weight, pixel_weight)
    )
    if (height - 1) * labels.stride(1) + (width - 1) * labels.stride(2) >= 2**31:
        labels = labels.contiguous()  # a view so wide that an image's offsets pass 32 bits
    halo = int(needs_dlogits)
    tiles = triton.cdiv(w, CELLS - 1) if halo else triton.cdiv(w + 1, CELLS)
    bands = bands_of(batch, tiles, h)
    strips = triton.cdiv(h + 1 - halo, bands)
    programs = batch * strips * tiles
    rows, cols, tail = window((h, w), (height, width), align_corners)
    with on_device_of(logits):
        denominator = (
            _denominator(labels, class_weight, num_classes, ignore_index)
            if needs_dlogits and reduction == "mean"
            else None
        )
        partial = None if none else torch.empty(2, programs, dtype=torch.float32, device=logits.device)
        cross_entropy_kernel[(programs,)](
            logits, labels, class_weight, pixel_weight, denominator, loss if none else None, dlogits if needs_dlogits else None, partial,
            flag(logits), num_classes, h, w, height, width, axis_scale(h, height, align_corners), axis_scale(w, width, align_corners),
            *logits.stride(), *labels.stride(), ignore_index, _LOG2E / temperature, 1 / temperature,
            bands, strips, tiles, max(height, width).bit_length(),
            align_corners, none, halo, rows, cols, min(8, power_of_two(-(-height // h))) if tail else 1, tail, CELLS, **LAUNCH,
        )  # fmt: skip
        if not none:
            finish_kernel[(1,)](partial, loss, torch.empty_like(loss), programs, reduction == "mean", BLOCK=1024)
    return loss, dlogits
