"""class_moments in CUDA C++: bugs planted in the kernels' source are seen by the emulator or by the values."""

from __future__ import annotations

import oracle
import pytest
import torch
from cuda_emulator import build, emulated
from problems import problem

import spcl_fast as sf

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")

BUGS = {
    "the norm of another pixel": ("class_moments.cuh", "squares[w * tile_pixels() + p]", "squares[w * tile_pixels() + (p ^ 1)]"),
    "one channel too few": ("class_moments.cuh", "channels(static_cast<int>(min(", "channels(-1 + static_cast<int>(min("),
    "one channel too many": ("class_moments.cuh", "channels(static_cast<int>(min(", "channels(1 + static_cast<int>(min("),
    "the first image only": ("class_moments.cuh", "is_flat(a.x) ? t.image *", "is_flat(a.x) ? 0 *"),
    "no flush where the class changes": ("class_moments.cuh", "    flush();\n    current = cls;", "    current = cls;"),
    "a first sum added to what was there": ("class_moments.cuh", "*to = fresh ? sum[own] : *to + sum[own]", "*to = *to + sum[own]"),
    "a later sum not added": ("class_moments.cuh", "*to = fresh ? sum[own] : *to + sum[own]", "*to = sum[own]"),
    "ignored pixels in a mixed unit": ("class_moments.cuh", "if (cls < 0) return;", "if (cls < 0) cls = 0;"),
    "not waited for the copies": ("class_moments.cuh", "    copy_async_wait<0>();\n    __syncwarp();", "    __syncwarp();"),
    "no barrier before the norms": ("class_moments.cuh", "b.square_rows();\n    __syncthreads();", "b.square_rows();"),
    "the last range lost": ("class_totals.cuh", "g < a.plan.ranges; g += t.parts", "g + 1 < a.plan.ranges; g += t.parts"),
    "a pixel too many at the image's end": ("class_moments.h", "static_cast<int>(left <", "static_cast<int>(1 + left <"),
    "counts cleared by every slice": ("class_moments.cuh", "if (b.m.mark_words || b.d0 == 0)", "if (true)"),
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


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_without_a_planted_bug_the_probes_are_right(order):
    for shape, dtype, classes in PROBLEMS_FOR_BUGS:
        p = problem(shape, classes, dtype=dtype, patch=(3, 5), ignored=0.1)
        assert_right(emulated.Backend("class_moments"), order, p.features, p.labels, classes)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug):
    planted = emulated.Backend("class_moments", replace=(BUGS[bug],))
    with pytest.raises((AssertionError, RuntimeError)):
        for shape, dtype, classes in PROBLEMS_FOR_BUGS:
            p = problem(shape, classes, dtype=dtype, patch=(3, 5), ignored=0.1)
            for order in ("forward", "reverse"):
                assert_right(planted, order, p.features, p.labels, classes)
