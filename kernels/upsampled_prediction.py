"""upsampled_prediction: class and confidence of every pixel of bilinearly up-sampled logits, which never exist.

The tiles of `upsample`: lanes own cells. The classes are walked twice: for the maximum and its class, then for the sum of exponentials;
confidence = 1 / sum_k exp(z_k - z_max). Floor: 1 exponential per pixel and class, 5 bytes a pixel written; no extra memory.
Shapes: logits [B, K, h, w] any strides; label uint8, confidence float32 [B, H, W] contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cells import CELLS, LAUNCH, axis_scale, first_pixel, flat, interpolate, load_corners, upper_weight, window
from .pixels import on_device_of
from .upsampled_cross_entropy import _LOG2E, bands_of


@triton.jit
def prediction_kernel(
    logits_ptr, threshold_ptr, label_ptr, confidence_ptr, K, h, w, H, W, scale_h, scale_w, stride_b, stride_k, stride_h, stride_w,
    ignore_index, factor, bands, strips, tiles, steps,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    strip = (tl.program_id(0) // tiles) % strips
    image = (tl.program_id(0) // (tiles * strips)).to(tl.int64)
    cells = tile * CELLS - 1 + tl.arange(0, CELLS)
    col_start = first_pixel(cells, W, scale_w, steps, ALIGN)
    col_end = first_pixel(cells + 1, W, scale_w, steps, ALIGN)
    widest = tl.max(col_end - col_start, 0)
    col0 = tl.minimum(tl.maximum(cells, 0), w - 1).to(tl.int64) * stride_w
    col1 = tl.minimum(tl.maximum(cells + 1, 0), w - 1).to(tl.int64) * stride_w
    logits_ptr += image * stride_b
    for band in range(strip * bands - 1, strip * bands - 1 + bands):
        row_start = first_pixel(band, H, scale_h, steps, ALIGN)
        row_end = first_pixel(band + 1, H, scale_h, steps, ALIGN)
        row0 = tl.minimum(tl.maximum(band, 0), h - 1).to(tl.int64) * stride_h
        row1 = tl.minimum(tl.maximum(band + 1, 0), h - 1).to(tl.int64) * stride_h
        for r0 in range(row_start, row_end, ROWS):
            for c0 in range(0, widest, COLS):
                i = (r0 + tl.arange(0, ROWS))[:, None, None]
                j = (col_start + c0)[None, None, :] + tl.arange(0, COLS)[None, :, None]
                y = upper_weight(i, tl.full([1, 1, 1], 0, tl.int32) + band, h, scale_h, ALIGN)
                x = upper_weight(j, cells[None, None, :], w, scale_w, ALIGN)
                top = tl.full([ROWS, COLS, CELLS], -float("inf"), tl.float32)
                label = tl.zeros([ROWS, COLS, CELLS], tl.int32)
                ptr = logits_ptr
                for k in range(0, K):
                    a, b, c, d = load_corners(ptr, factor, row0, row1, col0, col1)
                    z = interpolate(a, b, c, d, y, x)
                    label = tl.where(z > top, k, label)  # the first of equals, as argmax
                    top = tl.maximum(top, z)
                    ptr += stride_k
                total = tl.zeros([ROWS, COLS, CELLS], tl.float32)
                ptr = logits_ptr
                for _ in range(0, K):
                    a, b, c, d = load_corners(ptr, factor, row0, row1, col0, col1)
                    total += tl.exp2(interpolate(a, b, c, d, y, x) - top)
                    ptr += stride_k
                confidence = 1.0 / total
                confidence, label = flat(confidence), flat(label)
                if threshold_ptr is not None:
                    label = tl.where(confidence < tl.load(threshold_ptr + label), ignore_index, label)
                inside = flat((i < row_end) & (j < col_end[None, None, :]))
                pixel = image * H * W + flat(i * W + j)
                tl.store(label_ptr + pixel, label.to(tl.uint8), mask=inside)
                tl.store(confidence_ptr + pixel, confidence, mask=inside)


def upsampled_prediction(logits, size, thresholds, *, temperature, align_corners, ignore_index):
    """-> labels uint8 [B, H, W] (ignore_index below the threshold), confidence float32 [B, H, W]. Contract: `backends/reference.py`."""
    batch, num_classes, h, w = logits.shape
    height, width = size
    labels = torch.empty(batch, height, width, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(batch, height, width, dtype=torch.float32, device=logits.device)
    if labels.numel() == 0:
        return labels, confidence
    thresholds = None if thresholds is None else thresholds.contiguous()
    tiles = triton.cdiv(w + 1, CELLS)
    bands = bands_of(batch, tiles, h)
    strips = triton.cdiv(h + 1, bands)
    rows, cols, tail = window((h, w), (height, width), align_corners)
    with on_device_of(logits):
        prediction_kernel[(batch * strips * tiles,)](
            logits, thresholds, labels, confidence, num_classes, h, w, height, width,
            axis_scale(h, height, align_corners), axis_scale(w, width, align_corners), *logits.stride(),
            ignore_index, _LOG2E / temperature, bands, strips, tiles, max(height, width).bit_length(),
            align_corners, rows, cols if tail == 0 or rows * cols >= 16 else 2 * cols, CELLS, **LAUNCH,
        )  # fmt: skip
    return labels, confidence
