"""The up-sampled losses, predictions and confusion matrix of the C++ kernels with every option, against the formulas in float64."""

from __future__ import annotations

import formulas
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate

from spcl_fast.backends import cpu
from spcl_fast.backends.contract import Ask, UpsampledClasses, UpsampledLoss

REASON = cpu.why_not(Ask("upsampled_cross_entropy", torch.device("cpu"), torch.float32, num_classes=2, dim=2))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

OPTIONS = {
    "denominator": {"denominator": torch.tensor(100.0)},
    "weights": {"weights": True},
    "smoothing": {"label_smoothing": 0.1, "weights": True},
    "probabilities": {"grid": (9, 11), "weights": True},
    "probabilities on a grid of their own": {"grid": (6, 17), "label_smoothing": 0.1, "weights": True},
    "low temperature": {"temperature": 0.05, "label_smoothing": 0.2},
    "binary": {"binary": True, "weights": True},
    "binary smoothed": {"binary": True, "label_smoothing": 0.1, "weights": True},
    "binary of probabilities": {"binary": True, "grid": (9, 11)},
    "binary at a low temperature": {"binary": True, "temperature": 0.05},
    "focal": {"binary": True, "gamma": 2.0, "weights": True},
    "focal below 1": {"binary": True, "gamma": 0.5},
    "focal at a low temperature": {"binary": True, "gamma": 1.0, "temperature": 0.1},
    "focal of probabilities": {"binary": True, "gamma": 1.5, "grid": (9, 11), "label_smoothing": 0.1},
}


def problem(
    size,
    *,
    shape=(2, 7, 9, 11),
    align_corners=True,
    temperature=1.3,
    grid=None,
    weights=False,
    reduction="mean",
    **options,
) -> UpsampledLoss:
    generator = torch.Generator().manual_seed(0)
    batch, classes = shape[:2]
    logits = 3 * torch.randn(shape, generator=generator)
    labels = torch.randint(0, classes, (batch, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    if grid is not None:
        labels = torch.randn(batch, classes, *grid, generator=generator).softmax(1)
        labels[:, :, :2] = 0  # no label where a pixel lies between such nodes alone
    return UpsampledLoss(
        logits, labels, torch.rand(classes, generator=generator) + 0.5 if weights else None,
        torch.rand(batch, *size, generator=generator) if weights else None, temperature, align_corners, 255, reduction, size=size,
        **options,
    )  # fmt: skip


def computed(p: UpsampledLoss, binary: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return (cpu.upsampled_binary_cross_entropy if binary else cpu.upsampled_cross_entropy)(p, p.reduction != "none")


def by_autograd(p: UpsampledLoss, binary: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits = p.logits.to(dtype, copy=True).requires_grad_()
    loss = formulas.upsampled(p._replace(logits=logits), dtype, binary)
    loss.sum().backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(33, 70), (9, 11), (5, 7), (60, 140)])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_as_accurate_as_eager_in_value_and_gradient(option, size, align_corners):
    options = dict(OPTIONS[option])
    binary = options.pop("binary", False)
    p = problem(size, align_corners=align_corners, **options)
    for got, eager, truth in zip(
        computed(p, binary), by_autograd(p, binary, torch.float32), by_autograd(p, binary, torch.float64), strict=True
    ):
        assert_as_accurate(got, eager, truth)
    p = p._replace(reduction="none")
    truth = by_autograd(p, binary, torch.float64)[0]
    assert_as_accurate(computed(p, binary)[0], by_autograd(p, binary, torch.float32)[0], truth)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("height", [23, 100])
@pytest.mark.parametrize("option", ["smoothing", "probabilities on a grid of their own", "focal of probabilities"])
def test_bands_of_many_rows_of_nodes_pass_over_and_stay_between_them(option, height, align_corners):
    options = dict(OPTIONS[option])
    binary = options.pop("binary", False)
    if "grid" in options:
        options["grid"] = (50, 9)
    p = problem((height, 13), shape=(8, 5, 70, 6), align_corners=align_corners, **options)
    for got, eager, truth in zip(
        computed(p, binary), by_autograd(p, binary, torch.float32), by_autograd(p, binary, torch.float64), strict=True
    ):
        assert_as_accurate(got, eager, truth)


@pytest.mark.parametrize("option", OPTIONS)
def test_nothing_labelled_is_a_loss_and_gradient_of_exactly_0(option):
    options = dict(OPTIONS[option])
    binary = options.pop("binary", False)
    p = problem((20, 30), **options)
    labels = torch.zeros_like(p.labels) if p.labels.is_floating_point() else torch.full_like(p.labels, 255)
    logits = torch.where(torch.rand(p.logits.shape) < 0.1, torch.nan, p.logits)  # an ignored NaN goes nowhere
    for value in computed(p._replace(labels=labels, logits=logits), binary):
        assert (value == 0).all()


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_gives_the_same_bits_for_any_number_of_threads(option):
    options = dict(OPTIONS[option])
    binary = options.pop("binary", False)
    p = problem((60, 140), **options)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(computed(p, binary))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [-0.5, torch.nan, torch.inf])
def test_a_probability_that_is_none_is_reported_with_its_node(bad):
    p = problem((20, 30), grid=(9, 11))
    p.labels[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"of class 2 at pixel \(image 1, row 3, column 4\)"):
        computed(p, False)


# ---- masked classes -----------------------------------------------------------------------------------------------

LOW = [-torch.inf, torch.finfo(torch.float32).min, -2.4e38]


@pytest.mark.parametrize("size", [(9, 11), (20, 31)])
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_masked_class_is_as_if_it_were_not_there(low, size, smoothing):
    p = problem(size, label_smoothing=0.0)
    labels = torch.where(p.labels == 6, 255, p.labels)
    without = by_autograd(p._replace(logits=p.logits[:, :6], labels=labels), False, torch.float64)
    masked = p.logits.clone()
    masked[:, 6] = low
    if smoothing:  # the target of the masked class is 0, so its weight has to be
        weight = torch.ones(7)
        weight[6] = 0
        p = p._replace(class_weight=weight)
    loss, dlogits = computed(p._replace(logits=masked, labels=labels), False)
    assert torch.allclose(loss.double(), without[0], rtol=1e-6)
    assert torch.allclose(dlogits[:, :6].double(), without[1], atol=1e-8)
    assert (dlogits[:, 6].abs() <= (0 if low == -torch.inf else 1e-12)).all()


@pytest.mark.parametrize("low", LOW)
def test_a_label_of_a_masked_class_costs_what_it_does_in_torch(low):
    p = problem((9, 11))
    masked = p.logits.clone()
    masked[:, 6] = low
    labels = torch.where(p.labels == 6, 255, p.labels)
    labels[1, 2, 3] = 6  # one alone: the sum of two is infinite in torch
    p = p._replace(logits=masked, labels=labels, temperature=1.0)
    loss, dlogits = computed(p, False)
    leaf = masked.clone().requires_grad_()
    expected = F.cross_entropy(leaf, p.labels, ignore_index=255)
    expected.backward()
    assert loss == expected or torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(dlogits, leaf.grad, atol=1e-8)


@pytest.mark.parametrize("size", [(9, 11), (20, 31)])
@pytest.mark.parametrize("low", LOW)
def test_a_masked_class_is_never_predicted_nor_counted(low, size):
    p = problem(size)
    masked = p.logits.clone()
    masked[:, 0] = low
    expected = F.interpolate(p.logits[:, 1:], size, mode="bilinear", align_corners=True).softmax(1).max(1)
    labels, confidence = cpu.upsampled_prediction(UpsampledClasses(masked, size, True, 255))
    assert torch.equal(labels.long(), expected.indices + 1)
    assert torch.allclose(confidence, expected.values, atol=1e-6)
    counts = cpu.upsampled_confusion(UpsampledClasses(masked, size, True, 255, labels=p.labels))
    assert counts[:, 0].sum() == 0 and counts.sum() == (p.labels != 255).sum()


# ---- predictions --------------------------------------------------------------------------------------------------


def test_more_than_255_classes_are_predicted_as_int32():
    logits = torch.randn(2, 300, 5, 6)
    labels, _ = cpu.upsampled_prediction(UpsampledClasses(logits, (17, 23), True, 1000, thresholds=torch.zeros(300)))
    assert labels.dtype == torch.int32
    assert torch.equal(labels.long(), F.interpolate(logits, (17, 23), mode="bilinear", align_corners=True).argmax(1))
    below, _ = cpu.upsampled_prediction(UpsampledClasses(logits, (17, 23), True, 1000, thresholds=torch.ones(300)))
    assert (below == 1000).all()
    assert cpu.upsampled_prediction(UpsampledClasses(logits[:, :255], (17, 23), True, 255))[0].dtype == torch.uint8


def test_a_confidence_that_is_no_number_is_below_every_threshold():
    logits = torch.randn(1, 3, 4, 4)
    logits[0, 1, 1, 1] = torch.nan
    labels, confidence = cpu.upsampled_prediction(
        UpsampledClasses(logits, (7, 7), True, 255, thresholds=torch.zeros(3))
    )
    assert confidence.isnan().any() and torch.equal(labels == 255, confidence.isnan())


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("num_classes", [2, 19, 300])
def test_the_confusion_is_that_of_the_interpolated_logits(num_classes, align_corners):
    logits, labels = torch.randn(2, num_classes, 16, 24), torch.randint(0, num_classes, (2, 64, 90))
    labels[0, :3] = 1000
    up = F.interpolate(logits, (64, 90), mode="bilinear", align_corners=align_corners)
    top = up.topk(2, dim=1).values
    labels[(top[:, 0] - top[:, 1]) < 1e-5] = 1000  # which of two equal ones is the largest is rounding
    counted = labels != 1000
    expected = torch.bincount((labels * num_classes + up.argmax(1))[counted], minlength=num_classes**2)
    counts = cpu.upsampled_confusion(UpsampledClasses(logits, (64, 90), align_corners, 1000, labels=labels))
    assert counts.dtype == torch.int64 and torch.equal(counts.flatten(), expected)
    labels[1, 5, 7] = num_classes
    with pytest.raises(ValueError, match=rf"label {num_classes} at pixel \(image 1, row 5, column 7\)"):
        cpu.upsampled_confusion(UpsampledClasses(logits, (64, 90), align_corners, 1000, labels=labels))
