"""What the up-sampled losses share: a window of pixels of each lane's cell, its bounds, and the way back from pixels to nodes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .cells import interpolate, load_corners, raw_corners
from .operands import Labels, Map, Weights

LOWEST = tl.constexpr(-1e20)  # logits below it cost a walk more over the classes


class Soft(NamedTuple):
    """Probabilities [B, K, g, f] on a grid of their own, up-sampled by the logits' rule; nodes per pixel."""

    map: Map
    any: Map  # [B, 1, g, f]: 1 where a node has any probability; where none reaches a pixel, the pixel is unlabelled
    height: int
    width: int
    scale_h: float
    scale_w: float


class UpsampledTarget(NamedTuple):
    """What a pixel's up-sampled logits are compared with. t_k becomes keep * t_k + share (label smoothing)."""

    labels: Labels | None
    soft: Soft | None
    keep: float
    share: float
    plain: int | None  # labels, softmax and no smoothing
    binary: int | None  # a sigmoid for each class
    hard: int | None  # labels and no smoothing
    gamma: float | None  # of the focal loss


class Scaling(NamedTuple):
    """factor = log2(e) / temperature; what a mean is divided by, where a gradient is formed."""

    factor: float
    inv_temperature: float
    denominator: Tensor | None


class Image(NamedTuple):
    """In a kernel: pointers to what belongs to one image, None where there is none."""

    logits: tl.tensor
    labels: tl.tensor | None
    soft: tl.tensor | None
    any: tl.tensor | None
    pixel_weight: tl.tensor | None
    loss: tl.tensor | None
    dlogits: tl.tensor | None


class Terms(NamedTuple):
    """In a kernel: what is the same for all windows. stride_k: of the classes of the logits."""

    target: UpsampledTarget
    weights: Weights
    scaling: Scaling
    gradient_scale: tl.tensor
    K: tl.tensor
    stride_k: tl.tensor


class Band(NamedTuple):
    """In a kernel, of one row of cells: its index, the first pixel row beyond it, who counts its losses, which nodes are the program's."""

    index: tl.tensor
    row_end: tl.tensor
    mine: tl.tensor
    owned_node: tl.tensor
    add_top: tl.tensor
    add_bottom: tl.tensor


@triton.jit
def bounds_of(ptr, at, K, stride_k, CELLS: tl.constexpr):
    """Per lane: the largest corner of all classes (above every logit of the cell). And how far below it the true maximum may lie.
    Infinitely far where a corner is so low that it may be -inf; and of one class alone, so that its loss is exactly 0."""
    top = tl.full([CELLS], -float("inf"), tl.float32)
    low = tl.full([CELLS], -float("inf"), tl.float32)
    lowest = tl.full([CELLS], float("inf"), tl.float32)
    for _ in range(0, K):
        a, b, c, d = load_corners(ptr, at)
        top = tl.maximum(top, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))
        smallest = tl.minimum(tl.minimum(a, b), tl.minimum(c, d))
        low = tl.maximum(low, smallest)
        lowest = tl.minimum(lowest, smallest)
        ptr += stride_k
    gap = tl.max(top - low, 0)
    if (K == 1) | (tl.min(lowest, 0) < LOWEST):
        gap += float("inf")
    return top, gap


@triton.jit
def largest_of(ptr, at, K, stride_k, y, x, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr):
    """The true maximum of each pixel's logits."""
    largest = tl.full([ROWS, COLS, CELLS], -float("inf"), tl.float32)
    for _ in range(0, K):
        a, b, c, d = load_corners(ptr, at)
        largest = tl.maximum(largest, interpolate(a, b, c, d, y, x))
        ptr += stride_k
    return largest


@triton.jit
def added(sum, lost, term):
    """sum + term, and what rounding took from the sum so far (Kahan): one plain chain over K classes loses up to K times as much. Begin
    with zeros. An infinite sum stays infinite."""
    term = term - lost
    more = sum + term
    return more, tl.where(tl.abs(more) < float("inf"), (more - sum) - term, 0.0)


@triton.jit
def is_masked(ptr, at, y, x):
    """Where a class is -inf, which is read as the lowest float: where one of its nodes is, and counts."""
    a, b, c, d = raw_corners(ptr, at)
    a, b = (a == -float("inf")).to(tl.float32), (b == -float("inf")).to(tl.float32)
    c, d = (c == -float("inf")).to(tl.float32), (d == -float("inf")).to(tl.float32)
    return interpolate(a, b, c, d, y, x) > 0


@triton.jit
def add_to_nodes(dlogits_ptr, g, k, y, column, columns, band, grid, CELLS: tl.constexpr):
    """Adds a window's gradient g [ROWS, COLS, CELLS] of class k to the program's own nodes. column [COLS, CELLS]: x."""
    previous = tl.maximum(tl.arange(0, CELLS) - 1, 0)
    add_top = band.owned_node & band.add_top
    add_bottom = band.owned_node & band.add_bottom
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
