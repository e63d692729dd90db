"""class_moments in CUDA C++: bugs planted in the kernels' source are seen by the emulator or by the values."""

from __future__ import annotations

import oracle
import pytest
import torch
from cuda_emulator import build, emulated
from cuda_emulator.planted import Planted
from problems import problem

import spcl_fast as sf

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")

HEAD, TOTALS = "class_moments.cuh", "class_totals.cuh"
CHANNELS = "static_cast<int>(min(args.plan.slice, args.x.dim - d0))"
# Bugs, all built into one library and taken one at a time: (file, where, what stands there, what stands there wrongly).
BUGS = {
    "the norm of another pixel": (HEAD, "squares[w * tile_pixels() + {}]", "p", "(p ^ 1)"),
    "one channel too few": (HEAD, "channels({}),", CHANNELS, f"{CHANNELS} - 1"),
    "one channel too many": (HEAD, ": ({}))),", CHANNELS, f"{CHANNELS} + 1"),  # in the switch of the one before
    "the first image only": (HEAD, "is_flat(a.x) ? {} *", "t.image", "0"),
    "no flush where the class changes": (HEAD, "    {};\n    current = cls;", "flush()", "(void)0"),
    "a first sum added to what was there": (HEAD, "*to = {} ? sum[own] : *to + sum[own]", "fresh", "false"),
    "a later sum not added": (HEAD, "*to = {} ? square[own] : *to + square[own]", "fresh", "true"),
    "ignored pixels in a mixed unit": (HEAD, "if ({}) return;", "cls < 0", "cls < 0 && (cls = 0, false)"),
    "not waited for the copies": (HEAD, "    {};\n    __syncwarp();", "copy_async_wait<0>()", "(void)0"),
    "no barrier before the norms": (HEAD, "b.square_rows();\n    {};", "__syncthreads()", "(void)0"),
    "the last range lost": (TOTALS, "{} < a.plan.ranges; g += t.parts", "g", "g + 1"),
    "a pixel too many at the image's end": (HEAD, "more) b.load(tile_place(a.plan, {}, tile", "image", "image + 1"),
    "counts cleared by every slice": (HEAD, "if ({})", "b.m.mark_words || b.d0 == 0", "true"),
}  # fmt: skip


PROBLEMS_FOR_BUGS = [
    ((2, 40, 7, 9), torch.float32, 5),
    ((2, 34, 11, 31), torch.bfloat16, 5),
    ((1, 33, 5, 7), torch.float32, 2500),
]


def assert_right(backend: emulated.Backend, order: str, features, labels, num_classes: int) -> None:
    with emulated.guarded() as copy, backend.taken(order):
        got = sf.class_moments(copy(features), copy(labels), num_classes, squares=True, backend="cuda")
    truth = oracle.moments(features, labels, num_classes)
    eager = oracle.moments(features, labels, num_classes, dtype=torch.float32)
    assert torch.equal(got.counts, truth[1])
    oracle.assert_as_accurate(got.sums, eager[0], truth[0])
    oracle.assert_as_accurate(got.squares, eager[2], truth[2])


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted("class_moments", bugs=BUGS, header="class_moments.h")


def all_right(planted: Planted, order: str) -> None:
    for shape, dtype, classes in PROBLEMS_FOR_BUGS:
        p = problem(shape, classes, dtype=dtype, patch=(3, 5), ignored=0.1)
        assert_right(planted.backend, order, p.features, p.labels, classes)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_without_a_planted_bug_the_probes_are_right(planted, order):
    all_right(planted, order)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(planted, bug):
    with planted.bug(bug), pytest.raises((AssertionError, RuntimeError)):
        for order in ("forward", "reverse"):
            all_right(planted, order)
