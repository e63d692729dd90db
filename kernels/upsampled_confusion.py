"""upsampled_confusion: labels against the argmax of bilinearly up-sampled logits, counted; neither a prediction map nor the logits exist.

The tiles of `upsampled_prediction`, one walk over the classes, no exponentials. Integer atomics: their order cannot be seen. Copies of the
table share the atomics (a label map has few classes, so that most of a program's pixels meet in one entry).
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
    logits_map,
    place_of,
    rows_of,
    tiling_of,
    window_of,
    window_sizes,
)
from .operands import labels_at
from .pixels import classify, on_device_of

_COPIES, _COPIED_ENTRIES = 64, 1 << 18


@triton.jit
def confusion_kernel(
    logits, labels, counts_ptr, copies, K, grid, tiling, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr
):  # fmt: skip
    """counts [copies, K, K] int32: row = label, column = prediction."""
    place = place_of(logits, grid, tiling, ALIGN, 0, CELLS)
    counts_ptr += (tl.program_id(0) % copies).to(tl.int64) * K * K
    logits_ptr = logits.ptr + place.image * logits.stride_b
    label_ptr = labels.ptr + place.image * labels.stride_b
    for band in range(place.first, place.first + tiling.bands):
        row_start, row_end, at = rows_of(band, logits, grid, place, ALIGN)
        for r0 in range(row_start, row_end, ROWS):
            for c0 in range(0, place.widest, COLS):
                i, j, y, x = window_of(r0, c0, band, place.columns, grid, ALIGN, ROWS, COLS)
                _, predicted = best_of(logits_ptr, at, K, logits.stride_d, y, x, ROWS, COLS, CELLS)
                mask = flat(in_cell(i, j, row_end, place.columns))
                value = tl.load(label_ptr + flat(i * labels.stride_h + j * labels.stride_w), mask=mask, other=0)
                cls, _ = classify(value, labels, mask, K)
                tl.atomic_add(counts_ptr + tl.maximum(cls, 0).to(tl.int64) * K + flat(predicted), 1, mask=cls >= 0)


def upsampled_confusion(problem, flag: Tensor) -> Tensor:
    """-> [K, K] int64. problem: as the backends' `UpsampledClasses`, with labels; a bad label is left out and raises the flag."""
    logits, labels = problem.logits, problem.labels
    batch, num_classes, *low = logits.shape
    height, width = size = tuple(problem.size)
    copies = max(1, min(_COPIES, _COPIED_ENTRIES // num_classes**2))
    counts = torch.zeros(copies, num_classes, num_classes, dtype=torch.int32, device=logits.device)
    if labels.numel():
        if (height - 1) * labels.stride(1) + (width - 1) * labels.stride(2) >= 2**31:
            labels = labels.contiguous()  # a view so wide that an image's offsets pass 32 bits
        tiling = tiling_of(batch, tuple(low), 0)
        rows, cols, tail = window_sizes(tuple(low), size, problem.align_corners)
        cols = cols if tail == 0 or rows * cols >= 16 else 2 * cols
        with on_device_of(logits):
            confusion_kernel[(batch * tiling.strips * tiling.tiles,)](
                logits_map(logits), labels_at(labels, flag, height, width, problem.ignore_index), counts, copies, num_classes,
                grid_of(tuple(low), size, problem.align_corners), tiling, problem.align_corners, rows, cols, CELLS, **LAUNCH,
            )  # fmt: skip
    return counts.sum(0, dtype=torch.int64)
