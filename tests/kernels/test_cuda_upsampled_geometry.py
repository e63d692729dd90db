"""Cells, windows and blocks of the CUDA up-sampling kernels: integer arithmetic, compiled by the ordinary compiler, tried exhaustively."""

from __future__ import annotations

import ctypes
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from cuda_emulator import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
LARGE = 2**31 - 8


@pytest.fixture(scope="module")
def geometry():
    handle = ctypes.CDLL(str(build.library("upsampled_geometry", ["tests/cuda_emulator/upsampled_geometry.cpp"])))
    handle.most_pixels_a_cell.restype = ctypes.c_int64
    return handle


def ints(array: np.ndarray):
    assert array.dtype == np.int32
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int))


def position(pixel: int, size: int, out: int, align_corners: bool) -> Fraction:
    """In nodes, exactly."""
    if align_corners:
        return Fraction(pixel * (size - 1), out - 1) if out > 1 else Fraction(0)
    return Fraction((2 * pixel + 1) * size, 2 * out) - Fraction(1, 2)


def ranges(geometry, size: int, out: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    begin, end = np.empty(size + 2, np.int32), np.empty(size + 2, np.int32)
    geometry.cell_ranges(size, out, int(align_corners), ints(begin), ints(end))
    return begin, end


@pytest.mark.parametrize("align_corners", [True, False])
def test_every_pixel_lies_in_the_cell_that_its_exact_position_names(geometry, align_corners):
    for size in range(1, 14):
        for out in range(1, 60):
            begin, end = ranges(geometry, size, out, align_corners)
            assert begin[0] == 0 and end[-2] == out and begin[-1] == end[-1] == out and (begin[1:] == end[:-1]).all()
            cells = [min(floor(position(p, size, out, align_corners)), size - 1) for p in range(out)]
            assert cells == [c - 1 for c in range(size + 2) for _ in range(begin[c], end[c])], (size, out)
            assert (end - begin).max() <= geometry.most_pixels_a_cell(size, out, int(align_corners))


@pytest.mark.parametrize("align_corners", [True, False])
def test_the_weights_of_a_window_are_the_exact_ones(geometry, align_corners):
    nodes, weight = np.empty(2, np.int32), ctypes.c_float()
    for size, out in [(1, 5), (2, 9), (5, 40), (7, 23), (9, 4), (6, 6), (3, 1), (91, 720)]:
        begin, end = ranges(geometry, size, out, align_corners)
        for cell in range(-1, size):
            for pixel in range(begin[cell + 1], end[cell + 1]):
                window = max(begin[cell + 1], pixel - 3), end[cell + 1]
                geometry.pixel_weight(
                    size, out, int(align_corners), cell, *map(int, window), pixel, ints(nodes), ctypes.byref(weight)
                )
                exact = min(max(position(pixel, size, out, align_corners), Fraction(0)), Fraction(size - 1))
                assert abs(nodes[0] + weight.value * (nodes[1] - nodes[0]) - exact) < 3e-7 * max(1, nodes[1]), (
                    size,
                    out,
                    pixel,
                )
                assert 0 <= weight.value <= 1 + 1e-6 and 0 <= nodes[0] <= nodes[1] < size


@pytest.mark.parametrize("align_corners", [True, False])
def test_no_product_of_sizes_passes_through_32_bits(geometry, align_corners):
    size, weight, nodes = 5, ctypes.c_float(), np.empty(2, np.int32)
    begin, end = ranges(geometry, size, LARGE, align_corners)
    for cell in range(1, size):  # the first pixel at node `cell` or beyond
        step = Fraction(size - 1, LARGE - 1) if align_corners else Fraction(size, LARGE)
        first = ceil(cell / step if align_corners else (cell + Fraction(1, 2)) / step - Fraction(1, 2))
        assert begin[cell + 1] == min(first, LARGE)
    assert end[size] == LARGE
    pixel = int(end[3]) - 1  # the last one of cell 2
    geometry.pixel_weight(
        size, LARGE, int(align_corners), 2, int(begin[3]), pixel + 1, pixel, ints(nodes), ctypes.byref(weight)
    )
    assert list(nodes) == [2, 3] and weight.value == pytest.approx(1, abs=1e-6)


SIZES = [
    (5, 7, 40, 56), (7, 6, 23, 20), (10, 15, 4, 6), (1, 1, 30, 40), (20, 2, 80, 9), (3, 70, 6, 140), (1, 2, 3, 700), (2, 33, 19, 300),
    (40, 64, 80, 130),
]  # fmt: skip


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("images", [1, 2000])
@pytest.mark.parametrize(
    ("rows", "columns", "owns_nodes", "most_lanes"), [(5, 5, 1, 8), (4, 8, 1, 8), (3, 3, 0, 8), (2, 9, 0, 32)]
)
def test_each_pixel_and_each_node_has_one_owner(geometry, images, align_corners, rows, columns, owns_nodes, most_lanes):
    for h, w, height, width in SIZES:
        pixels, nodes = np.zeros((height, width), np.int32), np.zeros((h, w), np.int32)
        blocks = geometry.walk_plan(
            h,
            w,
            height,
            width,
            int(align_corners),
            images,
            rows,
            columns,
            owns_nodes,
            most_lanes,
            ints(pixels),
            ints(nodes),
        )
        assert blocks > 0 and (pixels == 1).all() and (nodes == owns_nodes).all(), (h, w, height, width)
