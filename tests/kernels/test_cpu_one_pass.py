"""prototype_contrastive_loss and its features' gradient in one pass of the C++ backend, against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from layouts import as_rows, laid_out
from on_backends import asked
from problems import CONTRAST, problem

import spcl_fast as sf
from spcl_fast.backends import cpu
from spcl_fast.backends.contract import Contrast, Wanted

REASON = cpu.why_not(asked(CONTRAST))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float32, torch.bfloat16]


def value_and_gradient(function, features, labels, prototypes, grad=1.0, **settings):
    features = features.detach().requires_grad_()
    loss = function(features, labels, prototypes, **settings)
    return loss.detach(), torch.autograd.grad(loss, features, torch.full_like(loss, grad))[0]


def run(*inputs, **settings):
    return value_and_gradient(sf.prototype_contrastive_loss, *inputs, backend="cpu", **settings)


def check(features, labels, prototypes, **settings):
    """At most twice the error of the same formula run eagerly in the features' dtype."""
    got = run(features, labels, prototypes, **settings)
    eager = value_and_gradient(oracle.contrast, features, labels, prototypes, dtype=features.dtype, **settings)
    truth = value_and_gradient(oracle.contrast, features.double(), labels, prototypes.double(), **settings)
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=4 * torch.finfo(features.dtype).eps / torch.finfo(g.dtype).eps)


@pytest.fixture
def calls(monkeypatch):
    """One entry for each loss that was formed in one pass."""
    seen, real = [], cpu.one_pass
    monkeypatch.setattr(cpu, "one_pass", lambda contrast: seen.append(1) or real(contrast))
    return seen


# One and several panels a tile, whole and ragged; one block of classes, several, and more classes than are contracted at a time.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_classes"),
    [((2, 24, 5, 13), 1), ((1, 64, 8, 48), 19), ((1, 130, 9, 29), 32), ((1, 300, 3, 22), 100), ((2, 512, 8, 16), 201)],
)
def test_value_and_gradient_are_as_accurate_as_eager(calls, shape, num_classes, dtype):
    check(*problem(shape, num_classes, dtype=dtype)[:3], temperature=0.3)
    assert calls


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_every_temperature(calls, dtype, temperature):
    check(*problem((2, 200, 5, 29), size=(11, 13), dtype=dtype)[:3], temperature=temperature)
    assert calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_enter_value_and_gradient_but_pixel_weight_not_the_denominator(calls, reduction, normalize, dtype):
    features, labels, prototypes = problem((2, 60, 5, 9), size=(11, 13), dtype=dtype)[:3]
    weights = {"class_weight": torch.tensor([0.2, 1, 3, 0, 1.5]), "pixel_weight": torch.rand(2, 9, 5).transpose(1, 2)}
    check(features, labels, prototypes, temperature=0.3, reduction=reduction, normalize=normalize, **weights)
    assert calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "cropped", "transposed", "rows", "misaligned"])
def test_any_layout_is_read_and_kept(calls, layout, dtype):
    features, labels, prototypes = problem((2, 101, 5, 29), size=(5, 29), dtype=dtype)[:3]
    expected = run(features, labels, prototypes, temperature=0.2)
    rows = layout == "rows"
    features, labels = (as_rows(features), labels.flatten()) if rows else (laid_out(features, layout), labels)
    loss, grad = run(features, labels, prototypes, temperature=0.2)
    if layout in ("channels_last", "transposed"):
        assert grad.stride() == features.stride()
    grad = grad.view(2, 5, 29, 101).permute(0, 3, 1, 2) if rows else grad
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad, expected[1])
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [0.5, -3.7, 0.0, 65536.0])
def test_an_incoming_gradient_that_is_not_1_scales(dtype, grad):
    inputs = problem((1, 33, 5, 9), size=(11, 13), dtype=dtype)[:3]
    expected = run(*inputs, temperature=0.2)[1].double() * grad
    torch.testing.assert_close(
        run(*inputs, grad, temperature=0.2)[1].double(), expected, rtol=torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("grad", [torch.inf, torch.nan])
def test_ignored_pixels_have_gradient_0_whatever_comes_in(grad):
    features, labels, prototypes = problem((1, 33, 5, 9), size=(5, 9))[:3]
    labels[0, 2] = 255
    ignored = (labels == 255)[:, None].expand_as(features)
    gradient = run(features, labels, prototypes, grad, temperature=0.2)[1]
    assert torch.all(gradient[ignored] == 0) and not gradient[~ignored].isfinite().any()


def test_a_kept_graph_gives_the_same_again_and_the_first_gradient_stays(calls):
    features, labels, prototypes = problem((1, 33, 5, 9), size=(11, 13))[:3]
    loss = sf.prototype_contrastive_loss(features.requires_grad_(), labels, prototypes, temperature=0.2, backend="cpu")
    first = torch.autograd.grad(3 * loss, features, retain_graph=True)[0]
    before = first.clone()
    second = torch.autograd.grad(5 * loss, features)[0]
    assert calls and torch.equal(first, before)
    torch.testing.assert_close(second, first * (5 / 3))


def test_a_gradient_that_may_not_reach_the_features_is_formed_in_two_passes(calls):
    def taken(dtype=torch.float32, dim=33, asks=(True, False), **settings):
        calls.clear()
        features, labels, prototypes = problem((1, dim, 3, 5), 5, (11, 13), dtype)[:3]
        inputs = features.requires_grad_(asks[0]), labels, prototypes.requires_grad_(asks[1])
        settings = {"temperature": 0.2, "backend": "cpu"} | settings
        assert sf.prototype_contrastive_loss(*inputs, **settings).isfinite().all()
        return bool(calls)

    assert taken() and taken(dtype=torch.bfloat16) and taken(dim=512) and taken(reduction="sum")
    assert not taken(dtype=torch.float16) and not taken(dim=513) and not taken(reduction="none")
    assert not taken(asks=(True, True)) and not taken(asks=(False, True)) and not taken(asks=(False, False))
    assert not taken(label_smoothing=0.1) and not taken(margin=0.1) and not taken(bias=torch.zeros(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_gives_what_two_give(monkeypatch, dtype):
    inputs = problem((2, 200, 9, 29), 19, dtype=dtype)[:3]
    one = run(*inputs, temperature=0.1)
    monkeypatch.setattr(cpu, "takes_one_pass", lambda contrast, wanted: False)
    for got, expected in zip(one, run(*inputs, temperature=0.1), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_same_bits_for_any_number_of_threads():
    inputs = problem((2, 100, 37, 61), 19)[:3]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(*inputs, temperature=0.1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_saved_like_says_that_the_gradient_alone_is_saved():
    features, labels, prototypes = problem((1, 33, 5, 9))[:3]
    contrast = Contrast(
        features, labels, prototypes, temperature=0.2, class_weight=None, pixel_weight=None, variances=None,
        normalize=True, ignore_index=255, reduction="mean",
    )  # fmt: skip
    _, saved = cpu.contrast_forward(contrast, Wanted(features=True))
    assert cpu.saved_like(contrast, Wanted(features=True)).one_pass
    assert saved.dfeatures.shape == features.shape and not any(part.numel() for part in saved[:4])
