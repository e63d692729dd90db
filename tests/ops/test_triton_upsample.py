"""upsampled_cross_entropy and upsampled_prediction in Triton: on the GPU, or in Triton's interpreter, against F.interpolate in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from problems import asked

import spcl_fast as sf
from spcl_fast import backends
from spcl_fast.backends.labels import label_flag

kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if DEVICE.type == "cpu" and (trouble := kernels.interpreter_trouble()):
    pytest.skip(trouble, allow_module_level=True)
# up (whole and broken ratios, a tail of one pixel a cell), same size, down, one node, one pixel, wider than one tile of cells
SIZES = [
    ((3, 5), (12, 20)), ((3, 4), (13, 17)), ((2, 3), (11, 22)), ((7, 5), (3, 2)), ((3, 4), (3, 4)), ((1, 1), (4, 4)), ((4, 4), (1, 1)),
    ((1, 35), (2, 70)),
]  # fmt: skip


def problem(low, high, num_classes=3, dtype=torch.float32, batch=1, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    logits = (scale * torch.randn(batch, num_classes, *low, generator=generator)).to(dtype)
    labels = torch.randint(0, num_classes, (batch, *high), generator=generator)
    if high != (1, 1):
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return logits.to(DEVICE), labels.to(DEVICE)


def value_and_gradient(function, logits, labels, weight=None, **settings):
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(logits, labels, **settings)
    (loss if weight is None else (loss * weight).sum()).backward()
    return loss.detach(), logits.grad


def check(logits, labels, weight=None, **settings):
    got = value_and_gradient(sf.upsampled_cross_entropy, logits, labels, weight, backend="triton", **settings)
    settings = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    weight = None if weight is None else weight.cpu()
    eager = value_and_gradient(oracle.upsampled, logits.cpu(), labels.cpu(), weight, dtype=torch.float32, **settings)
    truth = value_and_gradient(oracle.upsampled, logits.double().cpu(), labels.cpu(), weight, **settings)
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g.cpu(), e, t, slack=16)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_every_size_ratio(low, high, align_corners):
    check(*problem(low, high), align_corners=align_corners, temperature=1.8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_reductions_and_dtypes(reduction, dtype):
    logits, labels = problem((2, 3), (9, 11), dtype=dtype, batch=2)
    weights = {
        "class_weight": torch.tensor([0.2, 0, 1.5], device=DEVICE),
        "pixel_weight": torch.rand(2, 11, 9, device=DEVICE).mT,
    }
    check(
        logits,
        labels,
        torch.randn(2, 9, 11, device=DEVICE) if reduction == "none" else None,
        reduction=reduction,
        **weights,
    )


def test_logits_so_far_apart_that_the_corner_bound_underflows():
    """Neighbouring nodes 600 apart: exponentials against the cell's largest corner are all 0; the true maximum must be found."""
    logits, labels = problem((2, 3), (8, 12), scale=300.0)
    check(logits, labels, temperature=0.5)
    logits, labels = problem((2, 3), (8, 12))
    check(logits, labels, temperature=0.05)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.uint64])
def test_labels_of_any_integer_dtype_and_layout(dtype):
    logits, labels = problem((2, 3), (7, 9))
    expected = value_and_gradient(sf.upsampled_cross_entropy, logits, labels, backend="triton")
    turned = labels.to(dtype).mT.contiguous().mT
    turned_logits = logits.contiguous(memory_format=torch.channels_last)
    got = value_and_gradient(sf.upsampled_cross_entropy, turned_logits, turned, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero_not_nan(reduction):
    logits, labels = problem((2, 3), (5, 6))
    loss, grad = value_and_gradient(
        sf.upsampled_cross_entropy,
        logits,
        labels.fill_(255),
        torch.ones((), device=DEVICE),
        reduction=reduction,
        backend="triton",
    )
    assert torch.all(loss == 0) and torch.all(grad == 0)


@pytest.mark.parametrize("value", [3, -1, 2**33])
def test_label_beyond_classes_never_indexes_memory_but_raises_the_flag(value):
    logits, labels = problem((2, 3), (5, 6), batch=2)
    labels[1, 2, 3] = value
    flag = label_flag(DEVICE)
    flag.fill_(torch.iinfo(torch.int64).min)
    loss, grad = value_and_gradient(sf.upsampled_cross_entropy, logits, labels, backend="triton")
    assert loss.isnan() and grad.isnan().any() and flag == value
    flag.fill_(torch.iinfo(torch.int64).min)
    loss = sf.upsampled_cross_entropy(logits, labels, reduction="none", backend="triton")
    assert loss[1, 2, 3].isnan() and loss.isnan().sum() == 1 and flag == value
    flag.fill_(torch.iinfo(torch.int64).min)


def test_nan_in_nan_out_but_not_through_ignored_pixels():
    logits, labels = problem((3, 3), (5, 5), batch=2)
    labels[0] = 255
    labels[1] = 1
    logits[0, 2, 1, 1] = torch.nan
    loss, grad = value_and_gradient(sf.upsampled_cross_entropy, logits, labels, backend="triton")
    assert loss.isfinite() and grad.isfinite().all()
    labels[0] = 0
    assert sf.upsampled_cross_entropy(logits, labels, backend="triton").isnan()


def test_every_element_of_every_output_is_written(monkeypatch):
    real_empty = torch.empty
    poison = lambda t: t.fill_(torch.nan) if t.is_floating_point() else t.fill_(77)  # noqa: E731
    logits, labels = problem((3, 33), (7, 40))

    def everything():
        prediction = sf.upsampled_prediction(logits, (7, 40), backend="triton")
        return (*value_and_gradient(sf.upsampled_cross_entropy, logits, labels, backend="triton"), *prediction)

    expected = everything()
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(real_empty(*a, **k)))
    got = everything()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert sf.upsampled_cross_entropy(logits, labels, reduction="none", backend="triton").isfinite().all()


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_prediction_is_argmax_and_confidence(low, high, align_corners):
    logits, _ = problem(low, high)
    got = sf.upsampled_prediction(logits, high, temperature=1.3, align_corners=align_corners, backend="triton")
    top = (
        (F.interpolate(logits.double().cpu(), high, mode="bilinear", align_corners=align_corners) / 1.3)
        .softmax(1)
        .max(1)
    )
    assert torch.equal(got.labels.cpu().long(), top.indices)
    torch.testing.assert_close(got.confidence.double().cpu(), top.values, rtol=1e-4, atol=1e-6)


def test_prediction_below_its_threshold_is_ignored():
    logits, _ = problem((2, 3), (6, 7))
    plain = sf.upsampled_prediction(logits, (6, 7), backend="triton")
    thresholds = torch.tensor([0.5, 0.9, 0.99], device=DEVICE)
    got = sf.upsampled_prediction(logits, (6, 7), thresholds=thresholds, ignore_index=200, backend="triton")
    below = plain.confidence < thresholds[plain.labels.long()]
    assert below.any() and not below.all()
    assert torch.equal(got.labels, torch.where(below, 200, plain.labels)) and torch.equal(
        got.confidence, plain.confidence
    )


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0", "2.5.1", False),
        ("3.7.1", "2.5.1", True),
        ("3.10.0", "2.10.0", True),
    ],
)
def test_an_interpreter_that_cannot_work_is_named_before_it_is_used(monkeypatch, triton_version, numpy_version, works):
    monkeypatch.setattr("triton.__version__", triton_version)
    monkeypatch.setattr("numpy.__version__", numpy_version)
    trouble = kernels.interpreter_trouble()
    assert (trouble is None) == works
    reason = backends.why_not("triton", asked("class_moments"))
    assert reason == trouble or DEVICE.type == "cuda"
    if not works:
        assert f"Triton {triton_version}" in trouble and f"numpy {numpy_version}" in trouble
