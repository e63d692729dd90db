"""The shapes that each op is tested with: every way in which a backend cuts a problem."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from on_backends import ALL, usable
from problems import CONTRAST, CROSS, MOMENTS, Problem, problem


class Shape(NamedTuple):
    name: str
    shape: tuple[int, int, int, int]  # [B, D, h, w] of the features; of logits to be up-sampled D is K
    num_classes: int
    size: tuple[int, int] | None = None  # of the labels, where it is not the features' own
    too_slow: tuple[str, ...] = ()  # backends whose interpreter or emulator takes too long for it

    def problem(self, dtype=torch.float32, **more) -> Problem:
        ignored = {"ignored": 0} if self.size == (1, 1) else {}
        return problem(self.shape, self.num_classes, self.size, dtype, **ignored | more)


def _upsampled(name: str, low: tuple[int, int], high: tuple[int, int], num_classes=4, batch=2, too_slow=()) -> Shape:
    return Shape(name, (batch, num_classes, *low), num_classes, high, too_slow)


SHAPES = {
    MOMENTS: (
        Shape("labels of another size", (2, 16, 7, 9), 5, (15, 23)),
        Shape("smaller labels", (2, 20, 7, 9), 5, (4, 3)),
        Shape("ragged", (2, 40, 7, 9), 5),
        Shape("many pixels", (1, 33, 61, 67), 19, too_slow=("triton",)),
        Shape("one channel and class", (3, 1, 1, 1), 1),
        Shape("many classes", (1, 7, 5, 5), 1000),
        Shape("classes in blocks", (1, 33, 3, 7), 70),
        Shape("aligned rows", (1, 130, 8, 32), 19, too_slow=("triton",)),
        Shape("few pixels a tile", (1, 1100, 5, 13), 2, too_slow=("triton",)),
        Shape("norms in a pass of their own", (1, 2100, 3, 7), 4, too_slow=("triton",)),
        Shape("few ranges", (2, 33, 5, 7), 600, too_slow=("triton",)),
        Shape("one tile", (1, 16, 16, 16), 4),
        Shape("more classes than a block can note", (1, 70, 9, 40), 5000, too_slow=("triton",)),
    ),
    CONTRAST: (
        Shape("labels of another size", (2, 16, 7, 9), 5, (15, 23)),
        Shape("one class", (1, 7, 3, 11), 1),
        Shape("a single pixel", (1, 8, 1, 1), 5),
        Shape("two classes, whole tiles", (2, 64, 8, 16), 2, too_slow=("triton",)),
        Shape("odd rows", (1, 65, 9, 9), 19),
        Shape("logits saved", (2, 530, 5, 13), 19, too_slow=("triton",)),
        Shape("logits saved, few classes", (2, 530, 1, 5), 3),
        Shape("logits saved, classes in steps", (1, 161, 3, 7), 40),
        Shape("logits formed again, classes in steps", (1, 20, 5, 7), 40),
        Shape("rows on words", (1, 257, 3, 22), 21, too_slow=("triton",)),
        Shape("a block of classes and one", (1, 100, 8, 8), 33, too_slow=("triton",)),
        Shape("70 classes", (1, 40, 5, 7), 70),
        Shape("70 classes of deep features", (1, 544, 1, 65), 70, too_slow=("triton",)),
        Shape("150 classes", (1, 40, 5, 13), 150, too_slow=("triton",)),
        Shape("150 classes of deep features", (1, 608, 2, 31), 150, too_slow=("triton",)),
        Shape("240 classes", (1, 24, 3, 5), 240),
        Shape("a block of classes in several, and one", (2, 20, 3, 5), 241, too_slow=("triton",)),
        Shape("whole blocks of classes", (1, 70, 5, 15), 480, too_slow=("triton",)),
        Shape("blocks of classes, channels in slices", (1, 300, 2, 7), 512, too_slow=("triton",)),
        Shape("blocks of classes, logits saved", (1, 1204, 1, 9), 300, too_slow=("triton",)),
        Shape("1900 classes", (1, 33, 5, 13), 1900, too_slow=("triton", "cuda")),
    ),
    CROSS: (
        _upsampled("8 times", (5, 7), (40, 56), 5, too_slow=("triton",)),
        _upsampled("8 times, small", (3, 5), (24, 40), 3, 1),
        _upsampled("a broken ratio", (5, 7), (33, 50), 5),
        _upsampled("a broken ratio, small", (3, 4), (13, 17)),
        _upsampled("4 times", (3, 5), (12, 20)),
        _upsampled("a tail of one pixel a cell", (2, 3), (11, 22)),
        _upsampled("3.3 times", (7, 6), (23, 20), 3, 1),
        _upsampled("down", (13, 9), (6, 4), 5),
        _upsampled("down, 0.4", (10, 15), (4, 6), 3, 1),
        _upsampled("down, small", (7, 5), (3, 2)),
        _upsampled("down, cells without a pixel inside a band", (150, 9), (40, 12), 5, too_slow=("triton", "cuda")),
        _upsampled("the same size", (5, 7), (5, 7), 5),
        _upsampled("one node", (1, 1), (8, 13), 3),
        _upsampled("one pixel", (6, 6), (1, 1), 5),
        _upsampled("one row of nodes", (1, 9), (4, 3), 5),
        _upsampled("wider than a tile of cells", (2, 35), (3, 70)),
        _upsampled("several tiles", (2, 70), (8, 280), 3, 1, too_slow=("triton",)),
        _upsampled("several strips", (20, 2), (80, 8), 3, 1, too_slow=("triton",)),
        _upsampled("lanes that share a cell", (2, 33), (5, 350), 3, 1, too_slow=("triton",)),
        _upsampled("cells of more pixels than lanes can share", (2, 2), (3, 500), 3, 1, too_slow=("triton",)),
        _upsampled("bands of many rows", (70, 6), (100, 13), 5, 8, too_slow=("triton", "cuda")),
        _upsampled("bands of many rows, down", (70, 6), (23, 13), 5, 8, too_slow=("triton", "cuda")),
        _upsampled("one class", (4, 5), (15, 19), 1),
        _upsampled("two classes", (4, 5), (15, 19), 2),
        _upsampled("19 classes", (4, 5), (15, 19), 19, too_slow=("triton",)),
        _upsampled("150 classes", (4, 5), (15, 19), 150, too_slow=("triton",)),
        _upsampled("1000 classes", (2, 3), (5, 9), 1000, too_slow=("triton",)),
    ),
}  # fmt: skip


def on_each_shape(op: str, *needs: str, among: tuple[str, ...] = ALL, shapes: tuple[Shape, ...] | None = None) -> list:
    """(backend, shape), with readable ids."""
    return [
        pytest.param(backend, shape, id=f"{shape.name}-{backend}")
        for shape in (SHAPES[op] if shapes is None else shapes)
        for backend in usable(op, *needs, among=among, num_classes=shape.num_classes, dim=shape.shape[1])
        if backend not in shape.too_slow
    ]
