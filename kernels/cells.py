"""The geometry of bilinear up-sampling by cells, for every up-sampled op.

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
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .operands import Map
from .pixels import INTERPRETED, power_of_two

CELLS = 32  # one warp; a shift by one lane is one shuffle
# without maxnreg, ptxas prefers a few spills to more than 168 registers; the interpreter does not know it
LAUNCH = {"num_warps": 1, "num_stages": 1} | ({} if INTERPRETED else {"maxnreg": 255})
PROGRAMS = 4 if INTERPRETED else 2048  # aimed at
_LANE_PIXELS = 64 if INTERPRETED else 16


class Grid(NamedTuple):
    """From a map of h x w nodes to H x W pixels; scales are nodes per pixel, steps those of a bisection of either axis."""

    h: int
    w: int
    H: int
    W: int
    scale_h: float
    scale_w: float
    steps: int


class Tiling(NamedTuple):
    """How programs share an image: each walks `bands` rows of nodes of one of `strips` and one of `tiles` of columns."""

    bands: int
    strips: int
    tiles: int


class Corners(NamedTuple):
    """In a kernel: where each lane's cell has its four nodes (offsets within one class)."""

    row0: tl.tensor
    row1: tl.tensor
    col0: tl.tensor
    col1: tl.tensor


class Columns(NamedTuple):
    """In a kernel, of each lane: its cell, the first pixel of it and the first beyond."""

    cells: tl.tensor
    start: tl.tensor
    end: tl.tensor


class Place(NamedTuple):
    """In a kernel, of a program: its tile of columns, strip of rows and image; its first row of cells; its columns, the most pixels that
    one of them has, and where their nodes are."""

    tile: tl.tensor
    strip: tl.tensor
    image: tl.tensor
    first: tl.tensor
    columns: Columns
    widest: tl.tensor
    col0: tl.tensor
    col1: tl.tensor


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
def columns_of(first, grid, ALIGN: tl.constexpr, CELLS: tl.constexpr):
    """The cells from `first` on, one a lane."""
    cells = first + tl.arange(0, CELLS)
    start = first_pixel(cells, grid.W, grid.scale_w, grid.steps, ALIGN)
    return Columns(cells, start, first_pixel(cells + 1, grid.W, grid.scale_w, grid.steps, ALIGN))


@triton.jit
def node_offset(node, size, stride):
    """Offset of a row or column of nodes; beyond the map the outermost one."""
    return tl.minimum(tl.maximum(node, 0), size - 1).to(tl.int64) * stride


@triton.jit
def next_node_offset(node, size, out, stride):
    """Of the node behind; where an axis keeps its size, of `node` itself: no pixel may meet another's NaN there."""
    return node_offset(tl.where(size == out, node, node + 1), size, stride)


@triton.jit
def window_of(r0, c0, band, columns, grid, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """-> pixel rows [ROWS, 1, 1] and columns [1, COLS, CELLS] of a window, and their weights of the lower and the right nodes."""
    i = (r0 + tl.arange(0, ROWS))[:, None, None]
    j = (columns.start + c0)[None, None, :] + tl.arange(0, COLS)[None, :, None]
    y = upper_weight(i, tl.full([1, 1, 1], 0, tl.int32) + band, grid.h, grid.scale_h, ALIGN)
    x = upper_weight(j, columns.cells[None, None, :], grid.w, grid.scale_w, ALIGN)
    return i, j, y, x


@triton.jit
def place_of(logits, grid, tiling, ALIGN: tl.constexpr, HALO: tl.constexpr, CELLS: tl.constexpr):
    """Where the program stands."""
    tile = tl.program_id(0) % tiling.tiles
    strip = (tl.program_id(0) // tiling.tiles) % tiling.strips
    image = (tl.program_id(0) // (tiling.tiles * tiling.strips)).to(tl.int64)
    columns = columns_of(tile * (CELLS - HALO) - 1, grid, ALIGN, CELLS)
    col0 = node_offset(columns.cells, grid.w, logits.stride_w)
    col1 = next_node_offset(columns.cells, grid.w, grid.W, logits.stride_w)
    return Place(
        tile, strip, image, strip * tiling.bands - 1, columns, tl.max(columns.end - columns.start, 0), col0, col1
    )


@triton.jit
def rows_of(band, logits, grid, place, ALIGN: tl.constexpr):
    """Of a row of cells: its first pixel row, the first beyond it, and where its nodes are."""
    start = first_pixel(band, grid.H, grid.scale_h, grid.steps, ALIGN)
    end = first_pixel(band + 1, grid.H, grid.scale_h, grid.steps, ALIGN)
    row0 = node_offset(band, grid.h, logits.stride_h)
    row1 = next_node_offset(band, grid.h, grid.H, logits.stride_h)
    return start, end, Corners(row0, row1, place.col0, place.col1)


@triton.jit
def best_of(ptr, at, K, stride_k, y, x, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr):
    """Each pixel's largest logit, and the first class that has it, as argmax: NaN is the largest, and inf is as NaN."""
    top = tl.full([ROWS, COLS, CELLS], -float("inf"), tl.float32)
    best = tl.zeros([ROWS, COLS, CELLS], tl.int32)
    for k in range(0, K):
        a, b, c, d = load_corners(ptr, at)
        z = interpolate(a, b, c, d, y, x)
        better = ((z <= top) == 0) & (top < float("inf"))
        best = tl.where(better, k, best)
        top = tl.where(better, z, top)
        ptr += stride_k
    return top, best


@triton.jit
def in_cell(i, j, row_end, columns):
    """Which pixels of a window exist and lie in the lane's cell."""
    return (i < row_end) & (j < columns.end[None, None, :])


@triton.jit
def load_corners(ptr, at):
    """The four nodes of each lane's cell. -inf is read as the lowest float: between two of them lies no NaN."""
    a, b, c, d = raw_corners(ptr, at)
    return finite(a), finite(b), finite(c), finite(d)


@triton.jit
def raw_corners(ptr, at):
    a = tl.load(ptr + at.row0 + at.col0).to(tl.float32)
    b = tl.load(ptr + at.row0 + at.col1).to(tl.float32)
    c = tl.load(ptr + at.row1 + at.col0).to(tl.float32)
    d = tl.load(ptr + at.row1 + at.col1).to(tl.float32)
    return a, b, c, d


@triton.jit
def finite(node):
    return tl.where(node == -float("inf"), -3.4028234663852886e38, node)


@triton.jit
def interpolate(a, b, c, d, y, x):
    """Corners [CELLS], y [ROWS, 1, 1], x [1, COLS, CELLS] -> [ROWS, COLS, CELLS]."""
    left, right = a[None, None, :], b[None, None, :]
    top = left + x * (right - left)
    left, right = c[None, None, :], d[None, None, :]
    bottom = left + x * (right - left)
    return top + y * (bottom - top)


def grid_of(size: tuple[int, int], out: tuple[int, int], align_corners: bool) -> Grid:
    scales = (axis_scale(*pair, align_corners) for pair in zip(size, out, strict=True))
    return Grid(*size, *out, *scales, max(out).bit_length())


def tiling_of(images: int, size: tuple[int, int], halo: int) -> Tiling:
    """halo 1: programs own nodes and walk one cell more on the left and above; 0: they own cells."""
    height, width = size
    tiles = triton.cdiv(width, CELLS - 1) if halo else triton.cdiv(width + 1, CELLS)
    bands = 1  # more spare the halo, fewer make more programs
    while bands < 8 and images * tiles * triton.cdiv(height, 2 * bands) >= PROGRAMS:
        bands *= 2
    return Tiling(bands, triton.cdiv(height + 1 - halo, bands), tiles)


def logits_map(logits: Tensor) -> Map:
    return Map(logits, *logits.stride())


def axis_scale(size: int, out: int, align_corners: bool) -> float:
    """Nodes a pixel; as F.interpolate computes it."""
    if align_corners:
        return (size - 1) / (out - 1) if out > 1 else 0.0
    return size / out


@functools.lru_cache(maxsize=1024)
def window_sizes(size: tuple[int, int], out: tuple[int, int], align_corners: bool) -> tuple[int, int, int]:
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
