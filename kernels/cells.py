"""The geometry of bilinear up-sampling by cells, for `upsample` and `prediction`.

A cell is the square between four low-resolution nodes; cell c spans nodes c and c + 1, c from -1 (left of the first node) to size - 1
(right of the last). Every output pixel lies in exactly one cell. Lanes own cells and hold a window of their pixels [ROWS, COLS, CELLS] in
registers: a lane's four nodes are loaded once for ROWS x COLS pixels, neighbouring lanes load neighbouring nodes, and sums over pixels
cross no lane.
What belongs to pixels is loaded and stored as a flat vector (`flat`, free: the lane stays the cell): given a three-dimensional load, the
compiler would put lanes along the pixels for its sake, and convert between the two layouts in the innermost loop.
The first pixel of a cell is found by bisection of the very expression that interpolates, so rounding cannot lose or double a pixel.
"""

from __future__ import annotations

import functools
import math

import triton
import triton.language as tl

from .pixels import INTERPRETED, power_of_two

CELLS = 32  # one warp; a shift by one lane is one shuffle
# without maxnreg, ptxas prefers a few spills to more than 168 registers; the interpreter does not know it
LAUNCH = {"num_warps": 1, "num_stages": 1} | ({} if INTERPRETED else {"maxnreg": 255})
_LANE_PIXELS = 64 if INTERPRETED else 16


@triton.jit
def source(pixel, scale, ALIGN: tl.constexpr):
    """Position of an output pixel in nodes, as F.interpolate has it in float32, before it is clamped to the map."""
    if ALIGN:
        return pixel.to(tl.float32) * scale
    return (pixel.to(tl.float32) + 0.5) * scale - 0.5


@triton.jit
def first_pixel(cell, out_size, scale, steps, ALIGN: tl.constexpr):
    """The smallest pixel whose position is in `cell` or beyond; out_size where there is none. Scalar or vector; 2**steps > out_size."""
    low = cell * 0
    high = low + out_size
    for _ in range(0, steps):
        middle = (low + high) // 2
        beyond = tl.floor(source(middle, scale, ALIGN)) >= cell
        open_ = low < high
        high = tl.where(open_ & beyond, middle, high)
        low = tl.where(open_ & (beyond == 0), middle + 1, low)
    return low


@triton.jit
def upper_weight(pixel, cell, size, scale, ALIGN: tl.constexpr):
    """Weight of the cell's upper node. Outside the first and last node both nodes are one: the weight goes to the one that exists."""
    weight = tl.minimum(tl.maximum(source(pixel, scale, ALIGN) - cell.to(tl.float32), 0.0), 1.0)
    return tl.where(cell < 0, 1.0, tl.where(cell >= size - 1, 0.0, weight))


@triton.jit
def flat(window):
    """[ROWS, COLS, CELLS] -> [ROWS * COLS * CELLS]: the same registers of the same lanes."""
    return tl.reshape(window, [window.shape[0] * window.shape[1] * window.shape[2]])


@triton.jit
def load_corners(ptr, factor, row0, row1, col0, col1):
    """The four nodes of each lane's cell, scaled."""
    a = tl.load(ptr + row0 + col0).to(tl.float32) * factor
    b = tl.load(ptr + row0 + col1).to(tl.float32) * factor
    c = tl.load(ptr + row1 + col0).to(tl.float32) * factor
    d = tl.load(ptr + row1 + col1).to(tl.float32) * factor
    return a, b, c, d


@triton.jit
def interpolate(a, b, c, d, y, x):
    """Corners [CELLS], y [ROWS, 1, 1], x [1, COLS, CELLS] -> [ROWS, COLS, CELLS]."""
    left, right = a[None, None, :], b[None, None, :]
    top = left + x * (right - left)
    left, right = c[None, None, :], d[None, None, :]
    bottom = left + x * (right - left)
    return top + y * (bottom - top)


def axis_scale(size: int, out: int, align_corners: bool) -> float:
    """Nodes a pixel; as F.interpolate computes it."""
    if align_corners:
        return (size - 1) / (out - 1) if out > 1 else 0.0
    return size / out


@functools.lru_cache(maxsize=1024)
def window(size: tuple[int, int], out: tuple[int, int], align_corners: bool) -> tuple[int, int, int]:
    """ROWS, COLS and TAIL of a window: COLS covers most of a cell's pixels, TAIL (a second window, or 0) the few that are left.

    A ratio of 4.02 has cells of 4 and now and then of 5 pixels: one window of 8 would idle half its lanes' work.
    """
    rows, cols = (_pixels_a_cell(*pair, align_corners) for pair in zip(size, out, strict=True))
    main = min(8, power_of_two(cols + 1) // 2)
    tail = power_of_two(cols % main) if cols % main else 0
    if tail == main:
        main, tail = min(8, 2 * main), 0  # 7 = 8, not 4 + 4
    return min(_LANE_PIXELS // main, power_of_two(rows)), main, tail


def _pixels_a_cell(size: int, out: int, align_corners: bool) -> int:
    """The most pixels that one cell of an axis can hold, up to rounding (a window too narrow costs a second round, not a pixel)."""
    scale = axis_scale(size, out, align_corners)
    return out if scale * out <= 1 else max(1, math.ceil(1 / scale - 1e-6))
