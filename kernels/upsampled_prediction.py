"""upsampled_prediction: class and confidence of every pixel of bilinearly up-sampled logits, which never exist.

The tiles of `upsampled_cross_entropy`: lanes own cells. The classes are walked twice: for the maximum and its class, then for the sum of
exponentials: confidence = 1 / sum_k exp(z_k - z_max). Floor: 1 exponential per pixel and class, 5 bytes per pixel written; no extra memory.
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
    best_of,
    flat,
    grid_of,
    in_cell,
    interpolate,
    load_corners,
    logits_map,
    place_of,
    rows_of,
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
    place = place_of(logits, grid, tiling, ALIGN, 0, CELLS)
    logits_ptr = logits.ptr + place.image * logits.stride_b
    for band in range(place.first, place.first + tiling.bands):
        row_start, row_end, at = rows_of(band, logits, grid, place, ALIGN)
        for r0 in range(row_start, row_end, ROWS):
            for c0 in range(0, place.widest, COLS):
                i, j, y, x = window_of(r0, c0, band, place.columns, grid, ALIGN, ROWS, COLS)
                top, label = best_of(logits_ptr, at, K, logits.stride_d, y, x, ROWS, COLS, CELLS)
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
                mask = flat(in_cell(i, j, row_end, place.columns))
                pixel = place.image * grid.H * grid.W + flat(i * grid.W + j)
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
