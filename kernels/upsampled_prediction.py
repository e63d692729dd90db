"""upsampled_prediction: class and confidence of every pixel of bilinearly up-sampled logits, which never exist.

The tiles of `upsampled_cross_entropy`: lanes own cells. The classes are walked twice: for the maximum and its class, then for the sum of
exponentials: confidence = 1 / sum_k exp(z_k - z_max). Floor: 1 exponential per pixel and class, 5 bytes a pixel written; no extra memory.
Shapes: logits [B, K, h, w] any strides; label uint8, confidence float32 [B, H, W] contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import (
    CELLS,
    LAUNCH,
    Corners,
    columns_of,
    first_pixel,
    flat,
    grid_of,
    in_cell,
    interpolate,
    load_corners,
    logits_map,
    node_offset,
    tiling_of,
    window_of,
    window_sizes,
)
from .pixels import on_device_of
from .upsampled_cross_entropy import _LOG2E


@triton.jit
def prediction_kernel(
    logits, threshold_ptr, label_ptr, confidence_ptr, K, grid, tiling, ignore_index, factor,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiling.tiles
    strip = (tl.program_id(0) // tiling.tiles) % tiling.strips
    image = (tl.program_id(0) // (tiling.tiles * tiling.strips)).to(tl.int64)
    columns = columns_of(tile * CELLS - 1, grid, ALIGN, CELLS)
    widest = tl.max(columns.end - columns.start, 0)
    col0 = node_offset(columns.cells, grid.w, logits.stride_w)
    col1 = node_offset(columns.cells + 1, grid.w, logits.stride_w)
    logits_ptr = logits.ptr + image * logits.stride_b
    for band in range(strip * tiling.bands - 1, strip * tiling.bands - 1 + tiling.bands):
        row_start = first_pixel(band, grid.H, grid.scale_h, grid.steps, ALIGN)
        row_end = first_pixel(band + 1, grid.H, grid.scale_h, grid.steps, ALIGN)
        row0 = node_offset(band, grid.h, logits.stride_h)
        row1 = node_offset(band + 1, grid.h, logits.stride_h)
        at = Corners(row0, row1, col0, col1)
        for r0 in range(row_start, row_end, ROWS):
            for c0 in range(0, widest, COLS):
                i, j, y, x = window_of(r0, c0, band, columns, grid, ALIGN, ROWS, COLS)
                top = tl.full([ROWS, COLS, CELLS], -float("inf"), tl.float32)
                label = tl.zeros([ROWS, COLS, CELLS], tl.int32)
                ptr = logits_ptr
                for k in range(0, K):
                    a, b, c, d = load_corners(ptr, at)
                    z = interpolate(a, b, c, d, y, x)
                    label = tl.where(z > top, k, label)  # the first of equals, as argmax
                    top = tl.maximum(top, z)
                    ptr += logits.stride_d
                total = tl.zeros([ROWS, COLS, CELLS], tl.float32)
                ptr = logits_ptr
                for _ in range(0, K):
                    a, b, c, d = load_corners(ptr, at)
                    total += tl.exp2((interpolate(a, b, c, d, y, x) - top) * factor)
                    ptr += logits.stride_d
                confidence = 1.0 / total
                confidence, label = flat(confidence), flat(label)
                if threshold_ptr is not None:
                    label = tl.where(
                        confidence >= tl.load(threshold_ptr + label), label, ignore_index
                    )  # NaN is not enough
                mask = flat(in_cell(i, j, row_end, columns))
                pixel = image * grid.H * grid.W + flat(i * grid.W + j)
                tl.store(label_ptr + pixel, label.to(label_ptr.dtype.element_ty), mask=mask)
                tl.store(confidence_ptr + pixel, confidence, mask=mask)


def upsampled_prediction(problem) -> tuple[Tensor, Tensor]:
    """-> labels [B, H, W] (ignore_index below the threshold), confidence float32 [B, H, W]. problem: as `UpsampledClasses`."""
    logits = problem.logits
    batch, num_classes, h, w = logits.shape
    height, width = problem.size
    label_dtype = torch.uint8 if num_classes <= 255 else torch.int32
    labels = torch.empty(batch, height, width, dtype=label_dtype, device=logits.device)
    confidence = torch.empty(batch, height, width, dtype=torch.float32, device=logits.device)
    if labels.numel() == 0:
        return labels, confidence
    thresholds = None if problem.thresholds is None else problem.thresholds.contiguous()
    tiling = tiling_of(batch, (h, w), 0)
    rows, cols, tail = window_sizes((h, w), (height, width), problem.align_corners)
    cols = cols if tail == 0 or rows * cols >= 16 else 2 * cols
    with on_device_of(logits):
        prediction_kernel[(batch * tiling.strips * tiling.tiles,)](
            logits_map(logits), thresholds, labels, confidence, num_classes,
            grid_of((h, w), (height, width), problem.align_corners), tiling, problem.ignore_index, _LOG2E / problem.temperature,
            problem.align_corners, rows, cols, CELLS, **LAUNCH,
        )  # fmt: skip
    return labels, confidence
