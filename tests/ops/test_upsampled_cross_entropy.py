"""upsampled_cross_entropy and upsampled_prediction on every backend that runs on the CPU, against F.interpolate in float64."""

from __future__ import annotations

import subprocess
import sys

import oracle
import pytest
import torch
import torch.nn.functional as F
from problems import check_ops, usable

import spcl_fast as sf

LOSS = usable("upsampled_cross_entropy")
PREDICTION = usable("upsampled_prediction")
SIZES = [((5, 7), (40, 56)), ((5, 7), (33, 50)), ((13, 9), (6, 4)), ((5, 7), (5, 7)), ((1, 1), (8, 8)), ((6, 6), (1, 1)), ((1, 9), (4, 3)),
         ((150, 9), (40, 12))]  # fmt: skip  # the last: cells without a pixel inside a band


def problem(low, high, num_classes=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(2, num_classes, *low, generator=generator)).to(dtype)
    labels = torch.randint(0, num_classes, (2, *high), generator=generator)
    if high != (1, 1):
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return logits, labels


def value_and_gradient(function, logits, labels, weight=None, **settings):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, labels, **settings)
    (loss if weight is None else (loss * weight).sum()).backward()
    return loss.detach(), logits.grad


def check(backend, logits, labels, weight=None, **settings):
    got = value_and_gradient(sf.upsampled_cross_entropy, logits, labels, weight, backend=backend, **settings)
    eager = value_and_gradient(oracle.upsampled, logits, labels, weight, dtype=torch.float32, **settings)
    truth = value_and_gradient(oracle.upsampled, logits.double(), labels, weight, **settings)
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=16)


@pytest.mark.parametrize("backend", LOSS)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_every_size_ratio(backend, align_corners, low, high):
    check(backend, *problem(low, high), align_corners=align_corners, temperature=1.8)


@pytest.mark.parametrize("backend", LOSS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_reductions_and_dtypes(backend, reduction, dtype):
    logits, labels = problem((5, 7), (33, 50), dtype=dtype)
    weights = {"class_weight": torch.tensor([0.2, 1, 3, 0, 1.5]), "pixel_weight": torch.rand(2, 33, 50)}
    check(
        backend, logits, labels, torch.rand(2, 33, 50) if reduction == "none" else None, reduction=reduction, **weights
    )


@pytest.mark.parametrize("backend", LOSS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero_not_nan(backend, reduction):
    logits, labels = problem((5, 7), (33, 50))
    loss, grad = value_and_gradient(
        sf.upsampled_cross_entropy, logits, labels.fill_(255), torch.ones(()), reduction=reduction, backend=backend
    )
    assert torch.all(loss == 0) and torch.all(grad == 0)


@pytest.mark.parametrize("backend", LOSS)
def test_nan_in_nan_out_and_bad_labels_named(backend):
    logits, labels = problem((5, 7), (33, 50))
    labels[1, 20, 30] = 9
    with pytest.raises(ValueError, match=r"label 9 at pixel \(image 1, row 20, column 30\)"):
        sf.upsampled_cross_entropy(logits, labels, backend=backend)
    labels[1, 20, 30] = 255
    logits[0, 2, 2, 2] = torch.nan
    loss = sf.upsampled_cross_entropy(logits, labels, reduction="none", backend=backend)
    assert loss[0].isnan().any() and loss[1].isfinite().all()
    assert sf.upsampled_cross_entropy(logits, labels, backend=backend).isnan()


@pytest.mark.parametrize("backend", LOSS)
def test_same_bits_for_any_number_of_threads(backend):
    logits, labels = problem((33, 65), (264, 520), 19)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(value_and_gradient(sf.upsampled_cross_entropy, logits, labels, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", LOSS)
def test_opcheck_compile_and_loss_scale(backend):
    logits, labels = problem((5, 7), (33, 50))
    leaf = logits.clone().requires_grad_()
    check_ops(lambda: sf.upsampled_cross_entropy(leaf, labels, temperature=1.8, backend=backend).backward())

    def loss(logits, labels):
        return sf.upsampled_cross_entropy(logits, labels, backend=backend) * 2.0**16

    compiled = value_and_gradient(torch.compile(loss, fullgraph=True, backend="aot_eager"), logits, labels)
    assert all(torch.equal(a, b) for a, b in zip(value_and_gradient(loss, logits, labels), compiled, strict=True))


def test_gradcheck_and_no_second_gradient():
    logits, labels = problem((3, 4), (7, 9))
    logits = logits.double().requires_grad_()
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda x, r=reduction: sf.upsampled_cross_entropy(x, labels, reduction=r), (logits,), fast_mode=True
        )
    (grad,) = torch.autograd.grad(sf.upsampled_cross_entropy(logits, labels), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


PEAK = """
import resource, sys, torch, spcl_fast as sf
def step(low, high):
    logits = torch.zeros(1, 19, *low, requires_grad=True)
    labels = torch.zeros(1, *high, dtype=torch.uint8)
    sf.upsampled_cross_entropy(logits, labels, backend=sys.argv[1]).backward()
    sf.upsampled_prediction(logits.detach(), high, backend=sys.argv[1])
step((8, 16), (64, 128))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step((64, 128), (512, 1024))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


# Of one up-sampled map, 40 MB. Allowed: results and weights of the labels' size, strips of the reference, low-resolution gradients.
SHARE = {"reference": 0.75, "cpu": 0.25}


@pytest.mark.parametrize("backend", sorted(set(LOSS) & set(PREDICTION)))
def test_no_up_sampled_map_is_ever_allocated(backend):
    peak_bytes = 1024 * int(
        subprocess.run([sys.executable, "-c", PEAK, backend], check=True, capture_output=True, text=True).stdout
    )
    assert peak_bytes < SHARE[backend] * 4 * 19 * 512 * 1024


@pytest.mark.parametrize("backend", PREDICTION)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_prediction_is_argmax_and_confidence_of_the_up_sampled_softmax(backend, align_corners, low, high):
    logits, _ = problem(low, high)
    got = sf.upsampled_prediction(logits, high, temperature=1.3, align_corners=align_corners, backend=backend)
    softmax = (F.interpolate(logits.double(), high, mode="bilinear", align_corners=align_corners) / 1.3).softmax(1)
    top = softmax.max(1)
    assert got.labels.dtype == torch.uint8 and got.confidence.dtype == torch.float32
    torch.testing.assert_close(got.confidence.double(), top.values, rtol=1e-5, atol=1e-6)
    margin = softmax.topk(2, 1).values
    clear = margin[:, 0] - margin[:, 1] > 1e-5
    assert torch.equal(got.labels.long()[clear], top.indices[clear])


@pytest.mark.parametrize("backend", PREDICTION)
def test_prediction_below_its_threshold_is_ignored(backend):
    logits, _ = problem((5, 7), (33, 50))
    free = sf.upsampled_prediction(logits, (33, 50), backend=backend)
    thresholds = torch.tensor([0.5, 0.9, 0.0, 1.0, 0.7])
    got = sf.upsampled_prediction(logits, (33, 50), thresholds=thresholds, ignore_index=254, backend=backend)
    below = free.confidence < thresholds[free.labels.long()]
    assert below.any() and not below.all()
    assert torch.equal(got.labels, torch.where(below, 254, free.labels)) and torch.equal(
        got.confidence, free.confidence
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(2, 5, 7)}, ValueError, r"logits must be \[B, K, h, w\]"),
        ({"labels": torch.zeros(1, 8, 8, dtype=torch.long)}, ValueError, "must hold as many images"),
        ({"labels": torch.zeros(2, 8, 8)}, TypeError, "integer dtype"),
        ({"pixel_weight": torch.zeros(2, 5, 7)}, ValueError, "the labels' shape"),
        ({"temperature": -1.0}, ValueError, "above 0, got -1.0"),
        ({"backend": "triton_"}, ValueError, "unknown backend"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change, error, text):
    logits, labels = problem((5, 7), (33, 50))
    with pytest.raises(error, match=text):
        sf.upsampled_cross_entropy(**({"logits": logits, "labels": labels} | change))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"size": (0, 4)}, ValueError, "size must be"),
        ({"size": 8}, TypeError, r"size must be \(H, W\), got 8"),
        ({"size": (3.7, 3.2)}, TypeError, "in whole pixels, got"),
        ({"align_corners": None}, TypeError, "align_corners must be True or False, got None"),
        ({"ignore_index": 256}, ValueError, "uint8"),
        ({"thresholds": torch.ones(4)}, ValueError, "one threshold a class"),
        ({"thresholds": torch.ones(5), "ignore_index": 4}, ValueError, "ignore_index 4 is one of the 5 classes"),
    ],
)
def test_prediction_refuses_in_words(settings, error, text):
    with pytest.raises(error, match=text):
        sf.upsampled_prediction(torch.zeros(1, 5, 2, 2), **({"size": (4, 4)} | settings))
