"""The CUDA kernels' index arithmetic, compiled by the ordinary compiler: tiles, ranges, memory, labels, offsets beyond 2**31."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
FLOAT32, BFLOAT16 = 0, 1
LIMITS = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448}
PLANNED = {
    "A": (1, 2048, 91, 161, 19),
    "B": (2, 256, 256, 512, 19),
    "C": (1, 512, 512, 1024, 150),
    "D": (8, 256, 128, 256, 1900),
}
RAGGED = [
    (2, 40, 7, 9, 5), (1, 1100, 5, 13, 2), (2, 33, 5, 7, 600), (3, 1, 1, 1, 1), (1, 4096, 33, 65, 19), (2, 48, 33, 65, 100_000),
    (0, 8, 3, 3, 2),
]  # fmt: skip
FIELDS = (
    "tile_pixels", "tiles", "tiles_per_range", "ranges", "slice", "slices", "own_norms", "threads", "sums", "counts", "norms", "shared",
)  # fmt: skip


@pytest.fixture(scope="module")
def index():
    handle = build.load(build.library("moments_index", ["tests/cuda_emulator/moments_index.cpp"]))
    for name, arguments in {
        "nearest_index": [ctypes.c_int64] * 3, "offset": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64],
        "class_of": [ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.c_int64], "code": [ctypes.c_void_p, ctypes.c_int],
        "plan": [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p],
        "places": [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p],
        "owners": [ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p],
    }.items():  # fmt: skip
        getattr(handle, name).argtypes = arguments
    handle.nearest_index.restype = handle.offset.restype = ctypes.c_int64
    return handle


def longs(values):
    return (ctypes.c_int64 * len(values))(*values)


def planned(index, shape, dtype, limit, normalize=True):
    out = longs([0] * len(FIELDS))
    index.plan(dtype, longs(shape[:4]), shape[4], normalize, limit, out)
    return dict(zip(FIELDS, out, strict=True))


@pytest.mark.parametrize("shape", [*PLANNED.values(), *RAGGED])
def test_a_plan_fits_the_memory_of_every_architecture_and_of_the_workspace(index, shape):
    batch, dim, height, width, num_classes = shape
    for dtype, limit, normalize in itertools.product((FLOAT32, BFLOAT16), LIMITS.values(), (True, False)):
        p = planned(index, shape, dtype, limit, normalize)
        assert p["shared"] <= limit
        assert p["threads"] % 32 == 0 and p["tile_pixels"] <= p["threads"] <= 512
        assert p["slice"] * p["slices"] >= dim > p["slice"] * (p["slices"] - 1) and p["slice"] <= 4 * p["threads"]
        assert (
            (p["ranges"] - 1) * p["tiles_per_range"] < max(p["tiles"], 1) <= max(p["ranges"], 1) * p["tiles_per_range"]
        )
        assert not p["own_norms"] or (p["slices"] == 1 and normalize and p["norms"] == 0)
        assert p["norms"] == (batch * height * width if normalize and not p["own_norms"] else 0)
        # partial sums: at most a quarter of the features' elements, or one [K, D]
        assert p["sums"] <= max(batch * dim * height * width // 4, num_classes * dim)


def test_on_a_hopper_the_quoted_shapes_read_their_features_once(index):
    for name in "ABC":
        for dtype in (FLOAT32, BFLOAT16):
            assert planned(index, PLANNED[name], dtype, LIMITS["sm_90"])["own_norms"] == 1


@pytest.mark.parametrize("shape", [s for s in RAGGED if s[0]] + [PLANNED["A"]])
def test_tiles_hold_every_pixel_once_and_totals_have_one_owner(index, shape):
    batch, dim, height, width, num_classes = shape
    p = planned(index, shape, BFLOAT16, LIMITS["sm_90"])
    out = longs([0] * (3 * p["tiles"]))
    index.places(BFLOAT16, longs(shape[:4]), num_classes, LIMITS["sm_90"], out)
    seen = torch.zeros(batch, height * width, dtype=torch.int)
    for image, first, pixels in torch.tensor(list(out)).view(-1, 3).tolist():
        assert pixels > 0
        seen[image, first : first + pixels] += 1
    assert torch.all(seen == 1)
    if num_classes < 10_000:
        totals = torch.zeros(num_classes, dim, dtype=torch.int64)
        index.owners(BFLOAT16, longs(shape[:4]), num_classes, LIMITS["sm_90"], totals.data_ptr())
        assert torch.all(totals == 1)


def test_units_of_one_class_are_told_from_mixed_and_from_empty_ones(index):
    for classes in itertools.product((-2, -1, 0, 3), repeat=4):
        if max(classes) < 0:
            expected = -1
        elif len(set(classes)) == 1:
            expected = classes[0]
        else:
            expected = -2
        assert index.code((ctypes.c_int * 4)(*classes), 4) == expected


def test_the_nearest_rule_is_that_of_interpolate(index):
    for size, out in [(7, 7), (15, 7), (7, 15), (720, 91), (1280, 161), (1, 9), (9, 1), (511, 512), (1023, 341)]:
        expected = F.interpolate(torch.arange(size, dtype=torch.float64)[None, None], out, mode="nearest")[0, 0]
        assert [index.nearest_index(i, size, out) for i in range(out)] == expected.long().tolist()


def test_a_grid_of_the_labels_own_size_is_read_as_it_is_beyond_2_24(index):
    size = 2**31 + 7
    for i in (0, 2**24, 2**24 + 1, 2**25 + 3, 2**31 - 1, size - 1):
        assert index.nearest_index(i, size, size) == i
    assert (
        index.nearest_index(2**24, 2**24, 2**24 + 1) == 2**24 - 1
    )  # the scale is rounded to 1: still inside of the labels


def test_a_class_is_never_an_index_before_it_is_in_range(index):
    assert [index.class_of(v, 0, 255, 19) for v in (0, 18, 19, -1, 255, 2**40)] == [0, 18, -2, -2, -1, -2]
    assert index.class_of(-1, 0, -1, 19) == -1 and index.class_of(-1, 1, -1, 19) == -2  # 2**64 - 1 is not -1


def test_offsets_beyond_2_31(index):
    shape = (9, 2048, 256, 512)
    assert index.offset(longs(shape), 8, 256 * 512 - 1) == 8 * 2048 * 256 * 512 + 256 * 512 - 1 > 2**31
