"""class_moments of the cuda backend, its own kernels in the emulator, against a float64 one-hot product."""

from __future__ import annotations

import oracle
import pytest
import torch
from cuda_emulator import build

import spcl_fast as sf
from spcl_fast.backends.labels import label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64]


@pytest.fixture(scope="module")
def cuda():
    from cuda_emulator.emulated import Backend

    return Backend("class_moments")


def problem(shape, num_classes, size=None, dtype=torch.float32, layout="nchw", seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, dim, height, width = shape
    size = size or (height, width)
    coarse = torch.randint(0, num_classes, (batch, -(-size[0] // 3), -(-size[1] // 5)), generator=generator)
    labels = coarse.repeat_interleave(3, 1).repeat_interleave(5, 2)[:, : size[0], : size[1]].contiguous()
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return laid_out(torch.randn(shape, generator=generator).to(dtype), layout), labels


def laid_out(features, layout):
    """The same values in other strides; what lies between them is NaN."""
    batch, dim, height, width = features.shape
    if layout == "channels_last":
        return features.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return features.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "cropped":
        room = torch.full((batch, dim + 1, height + 2, width + 3), torch.nan, dtype=features.dtype)
        room[:, 1:, 1:-1, 2:-1] = features
        return room[:, 1:, 1:-1, 2:-1]
    return features.contiguous()


def moments(cuda, features, labels, num_classes, order="forward", **settings):
    """On copies whose memory ends where theirs ends: reading beyond is an error and not a number."""
    memory = build.Guarded(cuda.handle)
    given = memory.copy(features, alignment=2) if dense(features) else features
    try:
        with cuda.taken(order):
            return sf.class_moments(given, memory.copy(labels, alignment=1), num_classes, backend="cuda", **settings)
    finally:
        del given
        memory.close()


def dense(features):
    return features.numel() == 1 + sum((n - 1) * s for n, s in zip(features.shape, features.stride(), strict=True))


def assert_right(got, features, labels, num_classes, normalize=True):
    truth = oracle.moments(features, labels, num_classes, normalize=normalize)
    eager = oracle.moments(features, labels, num_classes, normalize=normalize, dtype=torch.float32)
    assert torch.equal(got.counts, truth[1])
    oracle.assert_as_accurate(got.sums, eager[0], truth[0])
    if got.squares is not None:
        oracle.assert_as_accurate(got.squares, eager[2], truth[2])


# dim 2000 holds few pixels a tile, 600 classes leave few ranges: the norms are a pass of their own
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed", "cropped"])
@pytest.mark.parametrize(
    ("shape", "num_classes"),
    [((2, 40, 7, 9), 5), ((1, 130, 8, 32), 19), ((1, 1100, 5, 13), 2), ((2, 33, 5, 7), 600), ((3, 1, 1, 1), 1)],
)
def test_sums_counts_and_squares(cuda, shape, num_classes, layout, dtype):
    features, labels = problem(shape, num_classes, dtype=dtype, layout=layout)
    got = moments(cuda, features, labels, num_classes, squares=True)
    assert_right(got, features, labels, num_classes)


@pytest.mark.parametrize("shape", [(2, 40, 7, 9), (1, 2100, 3, 7), (1, 16, 16, 16)])
def test_without_normalisation_and_without_squares(cuda, shape):
    features, labels = problem(shape, 4)
    assert_right(moments(cuda, features, labels, 4, normalize=False), features, labels, 4, normalize=False)
    assert_right(moments(cuda, features, labels, 4), features, labels, 4)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("size", [(7, 9), (15, 23), (4, 3)])
def test_labels_of_any_integer_dtype_and_size_are_read_in_place(cuda, size, dtype):
    features, labels = problem((2, 20, 7, 9), 5, size)
    labels[labels == 255] = 100
    got = moments(cuda, features, labels.to(dtype), 5, ignore_index=100)
    truth = oracle.moments(features, labels, 5, ignore_index=100)
    assert torch.equal(got.counts, truth[1])
    torch.testing.assert_close(got.sums.double(), truth[0], atol=1e-5, rtol=1e-5)


def test_more_classes_than_a_block_can_note(cuda):
    features, labels = problem((1, 70, 9, 40), 5)
    labels[labels == 4] = 4999
    got = moments(cuda, features, labels, 5000, squares=True)
    assert_right(got, features, labels, 5000)


@pytest.mark.parametrize(("shape", "num_classes"), [((2, 70, 9, 13), 5), ((1, 70, 5, 7), 3000)])
def test_same_bits_in_whichever_order_threads_and_blocks_take_turns(cuda, shape, num_classes):
    features, labels = problem(shape, num_classes, dtype=torch.bfloat16)
    results = [moments(cuda, features, labels, num_classes, order, squares=True) for order in build.ORDERS]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_nothing_labelled_is_zero_and_an_empty_batch_too(cuda):
    features, labels = problem((2, 16, 7, 9), 5)
    for x, y in ((features, torch.full_like(labels, 255)), (features[:0], labels[:0])):
        got = moments(cuda, x, y, 5, squares=True)
        assert all(torch.all(part == 0) for part in got)


def test_a_bad_label_is_left_out_and_raises_the_flag(cuda):
    features, labels = problem((2, 16, 7, 9), 5)
    clean = labels.clone()
    clean[1, 3, 4], labels[1, 3, 4] = 255, 7
    flag = label_flag(torch.device("cpu"))
    flag.fill_(torch.iinfo(torch.int64).min)
    got, expected = moments(cuda, features, labels, 5), moments(cuda, features, clean, 5)
    assert int(flag) == 7
    assert torch.equal(got.sums, expected.sums) and torch.equal(got.counts, expected.counts)


def test_nan_reaches_its_own_class_alone_and_none_where_it_is_ignored(cuda):
    features, labels = problem((1, 40, 7, 9), 5)
    features[0, 3, 2, 2], labels[0, 2, 2] = torch.nan, 255
    assert moments(cuda, features, labels, 5).sums.isfinite().all()
    labels[0, 2, 2] = 2
    sums = moments(cuda, features, labels, 5).sums
    assert sums[2].isnan().any() and sums[[0, 1, 3, 4]].isfinite().all()


def test_a_pixel_without_length_is_finite(cuda):
    features, labels = problem((1, 40, 7, 9), 5)
    features[:, :, 2] = 0
    assert_right(moments(cuda, features, labels, 5), features, labels, 5)


@pytest.mark.parametrize("absent", ["keep", "decay"])
@pytest.mark.parametrize(("shape", "num_classes"), [((2, 40, 17, 23), 5), ((1, 70, 5, 7), 40)])
def test_the_bank_moves_its_prototypes_in_the_kernel_as_it_does_elsewhere(cuda, shape, num_classes, absent):
    features, labels = problem(shape, num_classes)
    labels[labels == 1] = 255  # an absent class
    banks = [
        sf.PrototypeBank(num_classes, shape[1], keep=0.3, absent=absent, backend=name).load_(
            torch.ones(num_classes, shape[1])
        )
        for name in ("cuda", "reference")
    ]
    for step in range(2):
        with cuda.taken(("forward", "reverse")[step]):
            banks[0].update_(features, labels)
        banks[1].update_(features, labels)
    torch.testing.assert_close(banks[0].prototypes, banks[1].prototypes, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(banks[0].prototypes[1], torch.full((shape[1],), 1.0 if absent == "keep" else 0.3**2))


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


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug):
    from cuda_emulator.emulated import Backend

    planted = Backend("class_moments", replace=(BUGS[bug],))
    with pytest.raises((AssertionError, RuntimeError)):
        for shape, dtype, classes in PROBLEMS_FOR_BUGS:
            features, labels = problem(shape, classes, dtype=dtype)
            for order in ("forward", "reverse"):
                assert_right(
                    moments(planted, features, labels, classes, order, squares=True), features, labels, classes
                )
