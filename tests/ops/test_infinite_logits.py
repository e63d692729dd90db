"""Logits of -inf, inf and NaN: F.cross_entropy's value and gradient, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from on_backends import ALL, run, usable
from problems import BINARY, CONTRAST, CROSS, problem

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
INF, NAN = torch.inf, torch.nan
# logits of the 4 classes of one pixel; its label is 1
PIXELS = {
    "the label": [0.5, -INF, 1.0, 2.0],
    "the label and another": [-INF, -INF, 1.0, 2.0],
    "another": [0.5, 0.3, -INF, 2.0],
    "all": [-INF, -INF, -INF, -INF],
    "inf, the label": [0.5, INF, 1.0, 2.0],
    "inf, another": [0.5, 0.3, INF, 2.0],
    "NaN": [0.5, 0.3, NAN, 2.0],
    "NaN, the label": [0.5, NAN, 0.1, 2.0],
    "very low": [0.5, -2e38, 0.1, 2.0],
}


FINITE_GRADIENT = ("the label", "the label and another", "another", "very low")


def with_pixel(pixel: list[float]) -> dict[str, torch.Tensor]:
    """One pixel's logits are given, and its label is the second class."""
    drawn = problem((2, 4, 3, 5), 4, scale=1.0)
    logits, labels = drawn.logits.clone(), drawn.labels.clone()
    labels[0, 0, 0] = 255
    logits[1, :, 1, 2], labels[1, 1, 2] = torch.tensor(pixel), 1
    return {"logits": logits, "labels": labels}


def plain(logits, labels, reduction="mean", ignore_index=255, **settings):
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction, **settings)


def assert_same(backend: str, name: str, smoothing: float, reduction: str) -> None:
    given, settings = with_pixel(PIXELS[name]), {"label_smoothing": smoothing, "reduction": reduction}
    got, dlogits = run(sf.upsampled_cross_entropy, given, ["logits"], backend, **settings)
    expected, dexpected = run(plain, given, ["logits"], **settings)
    if (
        reduction == "none"
    ):  # what is no number has no weight at the pixels of the cells around, and yet makes them none
        spoiled = got.isnan() & ~expected.isnan()
        spoiled[1, :, 1:4] = False
        assert not spoiled.any() and (name not in FINITE_GRADIENT or not got.isnan().any())
        got = torch.where(got.isnan(), expected, got) if expected[1, 1, 2].isnan() and got[1, 1, 2].isnan() else got
    torch.testing.assert_close(got, expected, equal_nan=True)
    if name in FINITE_GRADIENT:
        torch.testing.assert_close(dlogits, dexpected, equal_nan=True)
    else:
        assert dlogits[1, :, 1, 2].isnan().all() and dexpected[1, :, 1, 2].isnan().all()
        torch.testing.assert_close(dlogits[0], dexpected[0])


@pytest.mark.parametrize("backend", usable(CROSS, among=ALL))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", PIXELS)
def test_at_equal_size_it_is_what_cross_entropy_gives(backend, reduction, name):
    assert_same(backend, name, 0.0, reduction)


@pytest.mark.parametrize("backend", usable(CROSS, "label_smoothing", among=ALL))
@pytest.mark.parametrize("name", PIXELS)
def test_with_smoothing_too(backend, name):
    assert_same(backend, name, 0.2, "mean")


@pytest.mark.parametrize("backend", usable(CROSS, among=ALL))
def test_a_label_of_weight_0_and_infinite_loss_costs_nan_as_in_cross_entropy_and_the_gradient_is_finite(backend):
    given, weights = with_pixel(PIXELS["the label and another"]), torch.tensor([1.0, 0.0, 0.5, 2.0])
    got, dlogits = run(
        sf.upsampled_cross_entropy, given | {"class_weight": weights}, ["logits"], backend, reduction="sum"
    )
    expected, dexpected = run(plain, given | {"weight": weights}, ["logits"], reduction="sum")
    assert got.isnan() and expected.isnan() and dexpected.isfinite().all()
    torch.testing.assert_close(dlogits, dexpected)


def contrast_of_logits(logits, labels, bias, **settings):
    """The same loss as a linear head on unit features: logits [N, K]."""
    rows = torch.eye(logits.shape[1], dtype=logits.dtype)
    return sf.prototype_contrastive_loss(
        logits, labels, rows.to(logits.device), bias=bias, temperature=1.0, normalize=False, **settings
    )


@pytest.mark.parametrize(
    ("backend", "classes"),  # for the C++ backend classes that are streamed, too
    [(name, 5) for name in usable(CONTRAST, "label_smoothing", "bias", among=ALL)] + [("cpu", 4200)],
)
@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_masked_class_costs_what_cross_entropy_makes_of_it_and_nothing_where_it_has_no_weight(
    backend, classes, smoothing, weight
):
    if backend not in usable(CONTRAST, "label_smoothing", "bias", among=ALL):
        pytest.skip(f"{backend} does not run here")
    generator = torch.Generator().manual_seed(0)
    given = {"logits": torch.randn(9, classes, generator=generator), "labels": torch.arange(9) % 5}
    bias, weights = torch.zeros(classes), torch.full((classes,), 0.5)
    bias[1], weights[1], given["labels"][3] = -INF, weight, 255
    for reduction in ("sum", "none"):
        settings = {"label_smoothing": smoothing, "reduction": reduction}
        ours = run(contrast_of_logits, given | {"bias": bias, "class_weight": weights}, ["logits"], backend, **settings)

        def theirs(logits, bias=bias, weight=weights, smoothing=smoothing, labels=None, reduction="sum", **_):
            """F.cross_entropy, but that a class without weight adds nothing where labels are smoothed."""
            z, weight = logits + bias.to(logits), weight.to(logits)
            if smoothing == 0 or weight[1] > 0:
                return plain(z, labels, reduction, weight=weight, label_smoothing=smoothing)
            there, index = labels != 255, labels.where(labels != 255, 0)
            target = weight * ((1 - smoothing) * F.one_hot(index, classes) + smoothing / classes)
            loss = torch.where(there, -torch.where(target == 0, 0, target * z.log_softmax(1)).sum(1), 0)
            return loss if reduction == "none" else loss.sum()

        truth = run(theirs, given, ["logits"], leaf_dtype=torch.float64, **settings)
        for got, expected in zip(ours, truth, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, backend) for op in (CROSS, BINARY) for backend in usable(op, among=ALL) if backend != "reference"],
)
@pytest.mark.parametrize("align_corners", [True, False])
def test_up_sampled_the_loss_of_a_label_of_minus_infinity_is_infinite(op, backend, align_corners):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 4, 5, generator=generator)
    logits[:, 2, 2:, 3:] = -INF
    labels = torch.randint(0, 3, (1, 13, 17), generator=generator)
    given, settings = {"logits": logits, "labels": labels}, {"align_corners": align_corners, "reduction": "none"}
    expected = run(getattr(sf, op), given, ["logits"], "reference", **settings)[0]
    assert (
        expected.isinf().any() and (expected.isinf() <= (labels == 2)).all() and expected[labels == 2].isfinite().any()
    )
    got = run(getattr(sf, op), given, ["logits"], backend, **settings)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
