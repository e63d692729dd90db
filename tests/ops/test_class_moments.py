"""class_moments on every backend that runs on the CPU, against a float64 one-hot product."""

from __future__ import annotations

import oracle
import pytest
import torch
from problems import check_ops, usable

import spcl_fast as sf
from spcl_fast import ops

BACKENDS = usable("class_moments")


def problem(shape=(2, 16, 7, 9), num_classes=5, size=(15, 23), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_classes, (shape[0], *size), generator=generator)
    labels[:, :, : size[1] // 4] = 255
    return torch.randn(shape, generator=generator).to(dtype), labels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "num_classes"), [((2, 16, 7, 9), 5), ((1, 33, 61, 67), 19), ((1, 7, 5, 5), 1000), ((3, 1, 1, 1), 1)]
)
def test_sums_counts_and_squares(backend, normalize, dtype, shape, num_classes):
    features, labels = problem(shape, num_classes, dtype=dtype)
    got = sf.class_moments(features, labels, num_classes, normalize=normalize, squares=True, backend=backend)
    truth = oracle.moments(features, labels, num_classes, normalize=normalize)
    eager = oracle.moments(features, labels, num_classes, normalize=normalize, dtype=torch.float32)
    assert got.sums.dtype == torch.float32 and got.counts.dtype == torch.int64
    assert torch.equal(got.counts, truth[1])
    oracle.assert_as_accurate(got.sums, eager[0], truth[0])
    oracle.assert_as_accurate(got.squares, eager[2], truth[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_rows_and_missing_squares(backend):
    features, labels = problem(size=(7, 9))
    expected = sf.class_moments(features, labels, 5, backend="reference")
    assert expected.squares is None
    rows = features.permute(0, 2, 3, 1).reshape(-1, 16)
    for f, y in (
        (features.contiguous(memory_format=torch.channels_last), labels),
        (rows, labels.flatten()),
        (features.transpose(2, 3).contiguous().transpose(2, 3), labels.to(torch.uint8)),
    ):
        got = sf.class_moments(f, y, 5, backend=backend)
        torch.testing.assert_close(got.sums, expected.sums)
        assert torch.equal(got.counts, expected.counts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_for_any_number_of_threads(backend):
    features, labels = problem((2, 48, 61, 67), 19, (61, 67))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(sf.class_moments(features, labels, 19, squares=True, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_labelled_and_bad_labels_and_nan(backend):
    features, labels = problem(size=(7, 9))
    empty = sf.class_moments(features, torch.full_like(labels, 255), 5, backend=backend)
    assert torch.all(empty.sums == 0) and torch.all(empty.counts == 0)
    labels[1, 3, 4] = 7
    with pytest.raises(ValueError, match=r"label 7 at pixel \(image 1, row 3, column 4\)"):
        sf.class_moments(features, labels, 5, backend=backend)
    labels[1, 3, 4] = 2
    features[1, 0, 3, 4] = torch.nan
    sums = sf.class_moments(features, labels, 5, backend=backend).sums
    assert sums[2].isnan().any() and sums[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    features, labels = problem()
    check_ops(lambda: sf.class_moments(features, labels, 5, squares=True, backend=backend))
    compiled = torch.compile(
        lambda f, y: sf.class_moments(f, y, 5, backend=backend), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(features, labels).sums, sf.class_moments(features, labels, 5, backend=backend).sums)


def test_what_does_not_fit_is_refused_in_words():
    features, labels = problem()
    with pytest.raises(ValueError, match="num_classes must be an int of at least 1, got 0"):
        sf.class_moments(features, labels, 0)
    with pytest.raises(TypeError, match="integer dtype, got torch.float32"):
        sf.class_moments(features, labels.float(), 5)


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
def test_prototypes_that_cannot_be_moved_are_refused_in_words(prototypes, error, text):
    features, labels = problem((2, 6, 7, 9))
    with pytest.raises(error, match=text):
        ops.move_prototypes_(prototypes, features, labels, keep=0.1)


def test_agreement_labels_ignore_where_the_prediction_differs():
    labels = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 255]]], dtype=torch.uint8)
    agreed = sf.agreement_labels(labels, torch.tensor([[[0, 0]]]))
    assert agreed.tolist() == [[[0, 255]]]
    assert sf.agreement_labels(labels, torch.tensor([[[0, 1]]]), ignore_index=-1).tolist() == [[[0, 1]]]
