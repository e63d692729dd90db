"""class_moments and what is built on it, on every backend that runs here, against a float64 one-hot product."""

from __future__ import annotations

import oracle
import pytest
import torch
from layouts import LABEL_DTYPES, LAYOUTS, as_rows, laid_out
from on_backends import (
    ALL,
    HALF_PRODUCTS,
    NO_BAD_LABEL,
    ON_CPU,
    ON_GPU,
    asked,
    assert_same_bits,
    call,
    check_ops,
    dtypes,
    flag,
    home,
    on_each_dtype,
    poison,
    usable,
    why_not,
)  # fmt: skip
from problems import MOMENTS, problem
from shapes import on_each_shape

import spcl_fast as sf
from spcl_fast import ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
EVERY = usable(MOMENTS, among=ALL)
WEIGHTED = usable(MOMENTS, "pixel_weight", among=ALL)


def moments(backend: str, features, labels, num_classes: int, **settings) -> sf.ClassMoments:
    return call(sf.class_moments, backend, features=features, labels=labels, num_classes=num_classes, **settings)


def assert_right(backend: str, features, labels, num_classes: int, **settings) -> None:
    got = moments(backend, features, labels, num_classes, squares=True, **settings)
    truth = oracle.moments(features, labels, num_classes, **settings)
    eager = oracle.moments(features, labels, num_classes, **settings, dtype=torch.float32)
    assert got.sums.dtype == got.squares.dtype == torch.float32
    if "pixel_weight" in settings:
        oracle.assert_as_accurate(got.counts, eager[1], truth[1])
    else:
        assert got.counts.dtype == torch.int64 and torch.equal(got.counts, truth[1])
    # Triton's x̂ is two half floats: 2**-17 for bfloat16, 2**-22 for float16
    split = backend == "triton" and features.dtype != torch.float32
    oracle.assert_as_accurate(got.sums, eager[0], truth[0], slack=512 if split else 4)
    oracle.assert_as_accurate(got.squares, eager[2], truth[2])


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half floats"])
@pytest.mark.parametrize(("backend", "shape"), on_each_shape(MOMENTS))
def test_sums_counts_and_squares_of_every_shape(backend, shape, half):
    for dtype in dtypes(backend)[1:] if half else [torch.float32]:
        for patch in ((1, 1), (3, 5)):  # runs of one class, too
            p = shape.problem(dtype, patch=patch, ignored=0.1)
            for normalize in (True, False):
                assert_right(backend, p.features, p.labels, shape.num_classes, normalize=normalize)


@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(MOMENTS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_read(backend, layout, dtype):
    shapes = [(2, 40, 7, 9), (1, 130, 8, 32), (1, 1100, 5, 13)]
    # the interpreter is slow; the reference adds the squares of 1100 channels that lie apart one by one
    for shape in shapes[: {"triton": 1, "cpu": 3, "cuda": 3}.get(backend, 2)]:
        p = problem(shape, dtype=dtype)
        assert_right(backend, laid_out(p.features, layout), p.labels, 5)


@pytest.mark.parametrize("backend", EVERY)
def test_rows_are_what_their_pixels_are(backend):
    p = problem((2, 16, 7, 9))
    expected = moments(backend, p.features, p.labels, 5)
    got = moments(backend, as_rows(p.features), p.labels.flatten(), 5)
    torch.testing.assert_close(got.sums, expected.sums)
    assert torch.equal(got.counts, expected.counts)


@pytest.mark.parametrize("backend", EVERY)
def test_without_squares_the_sums_are_the_same(backend):
    p = problem((2, 40, 7, 9))
    got, expected = (moments(backend, p.features, p.labels, 5, squares=squares) for squares in (False, True))
    assert got.squares is None and torch.equal(got.counts, expected.counts)
    torch.testing.assert_close(got.sums, expected.sums)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", LABEL_DTYPES)
@pytest.mark.parametrize("size", [(7, 9), (15, 23), (4, 3)])
def test_labels_of_any_integer_dtype_and_size_are_read_in_place(backend, size, dtype):
    p = problem((2, 20, 7, 9), 5, size)
    labels = p.labels.where(p.labels != 255, 100)
    got = moments(backend, p.features, labels.to(dtype), 5, ignore_index=100)
    truth = oracle.moments(p.features, labels, 5, ignore_index=100)
    assert torch.equal(got.counts, truth[1])
    torch.testing.assert_close(got.sums.double(), truth[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", WEIGHTED)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(2, 33, 3, 5), (2, 70, 9, 13)])
def test_weighted_moments_are_sums_of_weighted_pixels(backend, shape, normalize):
    for dtype in dtypes(backend):
        p = problem(shape, 6, dtype=dtype)
        assert_right(backend, p.features, p.labels, 6, normalize=normalize, pixel_weight=p.pixel_weight)


@pytest.mark.parametrize("backend", WEIGHTED)
def test_weights_of_1_are_no_weights(backend):
    p = problem((2, 70, 9, 13), 6)
    ones = moments(backend, p.features, p.labels, 6, squares=True, pixel_weight=torch.ones(2, 9, 13))
    plain = moments(backend, p.features, p.labels, 6, squares=True)
    assert plain.counts.dtype == torch.int64 and torch.equal(ones.counts, plain.counts.float())
    torch.testing.assert_close((ones.sums, ones.squares), (plain.sums, plain.squares), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize(("shape", "num_classes"), [((2, 48, 61, 67), 19), ((2, 70, 9, 13), 5), ((1, 70, 5, 7), 3000)])
def test_moments_have_the_same_bits_for_any_number_of_threads(backend, shape, num_classes):
    if backend in ON_GPU:  # their interpreter and emulator are slow
        shape, num_classes = (
            (shape[0], shape[1], min(shape[2], 9), shape[3]),
            min(num_classes, 3000 if backend == "cuda" else 70),
        )
    p = problem(shape, num_classes, dtype=torch.float32 if backend in ON_CPU else dtypes(backend)[-1])
    assert_same_bits(backend, lambda: moments(backend, p.features, p.labels, num_classes, squares=True))


@pytest.mark.parametrize("backend", EVERY)
def test_nothing_labelled_is_zero_and_an_empty_batch_too(backend):
    p = problem((2, 16, 7, 9))
    for x, y in ((p.features, torch.full_like(p.labels, 255)), (p.features[:0], p.labels[:0])):
        assert all(torch.all(part == 0) for part in moments(backend, x, y, 5, squares=True))


@pytest.mark.parametrize("backend", usable(MOMENTS))
def test_a_bad_label_is_named_with_its_pixel(backend):
    p = problem((2, 16, 7, 9))
    p.labels[1, 3, 4] = 7
    with pytest.raises(ValueError, match=r"label 7 at pixel \(image 1, row 3, column 4\)"):
        moments(backend, p.features, p.labels, 5)


@pytest.mark.parametrize("backend", usable(MOMENTS, among=ON_GPU))
def test_a_bad_label_is_left_out_and_raises_the_flag(backend, as_on_a_gpu):
    p = problem((2, 16, 7, 9))
    clean = p.labels.clone()
    clean[1, 3, 4], p.labels[1, 3, 4] = 255, 7
    flag(backend).fill_(NO_BAD_LABEL)
    got = moments(backend, p.features, p.labels, 5)
    assert int(flag(backend)) == 7
    flag(backend).fill_(NO_BAD_LABEL)
    expected = moments(backend, p.features, clean, 5)
    assert torch.equal(got.sums, expected.sums) and torch.equal(got.counts, expected.counts)
    assert int(flag(backend)) == NO_BAD_LABEL


@pytest.mark.parametrize("backend", EVERY)
def test_nan_reaches_its_own_class_alone_and_none_where_it_is_ignored(backend):
    p = problem((2, 40, 7, 9))
    p.features[1, 3, 2, 2], p.labels[1, 2, 2] = torch.nan, 255
    assert moments(backend, p.features, p.labels, 5).sums.isfinite().all()
    p.labels[1, 2, 2] = 2
    sums = moments(backend, p.features, p.labels, 5).sums
    assert sums[2].isnan().all() and sums[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("backend", EVERY)
def test_a_pixel_without_length_is_finite(backend):
    p = problem((1, 40, 7, 9))
    p.features[:, :, 2] = 0
    assert_right(backend, p.features, p.labels, 5)


@pytest.mark.parametrize("backend", EVERY)
def test_opcheck_and_compile(backend):
    p = problem((2, 16, 7, 9), size=(15, 23))
    features, labels = p.features.to(home(backend)), p.labels.to(home(backend))
    check_ops(lambda: sf.class_moments(features, labels, 5, squares=True, backend=backend), backend=backend)
    compiled = torch.compile(
        lambda f, y: sf.class_moments(f, y, 5, backend=backend), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(features, labels).sums, sf.class_moments(features, labels, 5, backend=backend).sums)


@pytest.mark.parametrize("backend", usable(MOMENTS, among=HALF_PRODUCTS))
def test_every_element_of_the_moments_is_written(backend, monkeypatch):
    """torch.empty hands out NaN: an element that a kernel forgets stays NaN."""
    p = problem((2, 33, 3, 5))
    expected = moments(backend, p.features, p.labels, 5, squares=True)
    poison(monkeypatch)
    assert all(map(torch.equal, expected, moments(backend, p.features, p.labels, 5, squares=True)))


# ---- the bank ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["keep", "decay"])
@pytest.mark.parametrize(("shape", "num_classes"), [((2, 40, 17, 23), 5), ((1, 70, 5, 7), 40)])
@pytest.mark.parametrize("backend", [name for name in EVERY if name != "reference"])
def test_the_bank_moves_its_prototypes_as_the_reference_does(backend, shape, num_classes, absent):
    p = problem(shape, num_classes)
    labels = p.labels.where(p.labels != 1, 255)  # an absent class

    def moved(name: str):
        def updated(features, labels, start, backend):
            bank = sf.PrototypeBank(num_classes, shape[1], keep=0.3, absent=absent, backend=backend)
            bank = bank.to(features.device).load_(start)
            for _ in range(2):
                bank.update_(features, labels)
            return bank.prototypes

        return call(updated, name, features=p.features, labels=labels, start=torch.ones(num_classes, shape[1]))

    got = moved(backend)
    torch.testing.assert_close(got, moved("reference"), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got[1], torch.full((shape[1],), 1.0 if absent == "keep" else 0.3**2))


# ---- what is refused ---------------------------------------------------------------------------------------------------


def test_num_classes_and_labels_that_do_not_fit_are_refused_with_the_reason():
    p = problem()
    with pytest.raises(ValueError, match="num_classes must be an int of at least 1, got 0"):
        sf.class_moments(p.features, p.labels, 0)
    with pytest.raises(TypeError, match="integer dtype, got torch.float32"):
        sf.class_moments(p.features, p.labels.float(), 5)


@pytest.mark.parametrize(
    ("prototypes", "error", "text"),
    [
        (torch.zeros(5, 7), ValueError, "must agree in their channels"),
        (torch.zeros(5), ValueError, r"prototypes must be \[K, D\]"),
        (torch.zeros(5, 6, dtype=torch.bfloat16), ValueError, "contiguous and float32, got torch.bfloat16"),
        (torch.zeros(6, 5).t(), ValueError, "got torch.float32, not contiguous"),
        (torch.zeros(5, 6, dtype=torch.int64), TypeError, "prototypes must be float32"),
        (torch.zeros(5, 6, device="meta"), ValueError, "prototypes is on meta and features on cpu"),
    ],
)
def test_prototypes_that_cannot_be_moved_are_refused_with_the_reason(prototypes, error, text):
    p = problem((2, 6, 7, 9), size=(15, 23))
    with pytest.raises(error, match=text):
        ops.move_prototypes_(prototypes, p.features, p.labels, keep=0.1)


@pytest.mark.parametrize("backend", [name for name in EVERY if name in ("cpu", *HALF_PRODUCTS)])
def test_a_backend_says_why_it_does_not_take_float64_or_an_unknown_option(backend):
    assert why_not(backend, asked(MOMENTS)) is None
    assert "float64" in why_not(backend, asked(MOMENTS, dtype=torch.float64))
    assert "no `unheard_of`" in why_not(backend, asked(MOMENTS, "unheard_of"))


def test_agreement_labels_ignore_where_the_prediction_differs():
    labels = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 255]]], dtype=torch.uint8)
    agreed = sf.agreement_labels(labels, torch.tensor([[[0, 0]]]))
    assert agreed.tolist() == [[[0, 255]]]
    assert sf.agreement_labels(labels, torch.tensor([[[0, 1]]]), ignore_index=-1).tolist() == [[[0, 1]]]
