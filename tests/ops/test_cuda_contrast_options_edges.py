"""What prototype_contrastive_loss with options must not do in CUDA C++, run by the emulator; and the options through the public op."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import build, emulated
from test_cuda_contrast_options import (
    ALL,
    NO_BAD_LABEL,
    OP,
    OPTIONS,
    check,
    probabilities,
    problem,
    run,
    shared_bias,
)  # fmt: skip
from torch import Tensor

import spcl_fast as sf
from spcl_fast import backends
from spcl_fast.backends.contract import Contrast, Wanted
from spcl_fast.backends.labels import BAD_PROBABILITY, label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def built():
    return emulated.Backend(OP)


@pytest.fixture
def cuda(built, monkeypatch):
    """The emulated kernels; what torch.empty_like hands out is full of NaN."""
    real = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda *a, **k: t.fill_(torch.nan) if (t := real(*a, **k)).is_floating_point() else t
    )
    label_flag(torch.device("cpu")).fill_(NO_BAD_LABEL)
    with built.taken():
        yield backends.module("cuda")
    label_flag(torch.device("cpu")).fill_(NO_BAD_LABEL)


GENERAL = {"bias": shared_bias, "temperature": torch.tensor(0.3)}


@pytest.mark.parametrize("num_classes", [5, 330])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [GENERAL, {"labels": lambda c, _: torch.zeros(2, c.num_classes, 3, 5)}])
def test_nothing_labelled_is_zero_even_for_nan_features(cuda, options, reduction, num_classes):
    c = problem((2, 20, 3, 5), num_classes, ignored=1.0, **options)._replace(reduction=reduction)
    c.features.fill_(torch.nan)
    assert all(torch.all(t == 0) for t in run(cuda, c))


@pytest.mark.parametrize("num_classes", [5, 330])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_nan_features_spoil_labelled_pixels_alone(cuda, kind, num_classes):
    c = problem((2, 20, 3, 5), num_classes, **GENERAL | ({"labels": probabilities} if kind == "probabilities" else {}))
    unlabelled = c.labels.sum(1) == 0 if kind == "probabilities" else c.labels == c.ignore_index
    assert unlabelled.any()
    expected = run(cuda, c)
    c.features.copy_(torch.where(unlabelled[:, None], torch.nan, c.features))
    got = run(cuda, c)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    c.features[0, 3, 1, 1] = torch.nan
    c.labels[0, ..., 1, 1] = 1
    loss, dfeatures, *_ = run(cuda, c)
    assert loss.isnan() and dfeatures[0, :, 1, 1].isnan().all() and dfeatures[1].isfinite().all()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_classes", [5, 330])
def test_a_class_with_a_bias_of_minus_infinity_has_no_probability_and_costs_nothing(cuda, num_classes, loss):
    c = problem((2, 20, 3, 5), num_classes, loss=loss)
    c.labels[c.labels == 2] = 0
    masked = torch.zeros(num_classes).index_fill(0, torch.tensor([2]), -torch.inf)
    others = torch.arange(num_classes) != 2
    got = run(cuda, c._replace(bias=masked))
    without = c._replace(
        prototypes=c.prototypes[others], bias=masked[others], labels=torch.where(c.labels > 2, c.labels - 1, c.labels)
    )
    expected = run(cuda, without)
    torch.testing.assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[2][others], expected[2], rtol=1e-5, atol=1e-7)
    assert torch.all(got[2][2] == 0) and got[3][2] == 0


@pytest.mark.parametrize("num_classes", [5, 330])
def test_a_bad_label_makes_the_loss_nan_and_raises_the_flag(cuda, num_classes):
    c, flag = problem((2, 20, 3, 5), num_classes, **GENERAL), label_flag(torch.device("cpu"))
    c.labels[1, 2, 3] = num_classes
    loss, dfeatures, *_ = run(cuda, c)
    assert loss.isnan() and dfeatures[1, :, 2, 3].isnan().all() and flag == num_classes


@pytest.mark.parametrize("bad", [-0.1, torch.nan, torch.inf])
@pytest.mark.parametrize("num_classes", [5, 330])
def test_a_bad_probability_makes_the_loss_nan_and_raises_the_flag(cuda, num_classes, bad):
    c, flag = problem((2, 20, 3, 5), num_classes, labels=probabilities), label_flag(torch.device("cpu"))
    assert run(cuda, c)[0].isfinite() and flag == NO_BAD_LABEL
    c.labels[1, 3, 2, 3] = bad
    loss, dfeatures, *_ = run(cuda, c)
    assert loss.isnan() and dfeatures[1, :, 2, 3].isnan().all() and flag == BAD_PROBABILITY


def test_a_denominator_of_zero_is_loss_zero_and_gradient_zero(cuda):
    assert all(torch.all(t == 0) for t in run(cuda, problem(bias=shared_bias, denominator=torch.tensor(0.0))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [5, 330])
def test_rows_of_any_layout_and_probabilities_of_any_layout(cuda, num_classes, dtype):
    c = problem((2, 37, 3, 21), num_classes, dtype, **OPTIONS["sigmoid of probabilities with weights"])
    check(cuda, c._replace(loss="softmax"))
    last = torch.channels_last
    mixed = c._replace(
        features=c.features.contiguous(memory_format=last), labels=c.labels.contiguous(memory_format=last)
    )
    check(cuda, mixed._replace(labels=mixed.labels.half()))


@pytest.mark.parametrize("name", ["all with labels", "probabilities, smoothing and weights", "variances with the rest"])
@pytest.mark.parametrize("num_classes", [19, 330])
def test_same_bits_whatever_the_order_of_threads_and_blocks(built, cuda, name, num_classes):
    c, results = problem((2, 70, 9, 9), num_classes, **OPTIONS[name]), []
    for order in build.ORDERS:
        with built.taken(order):
            results.append(run(cuda, c))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_an_empty_batch_has_no_loss_and_gradients_of_zero(cuda):
    c = problem((0, 20, 3, 5), bias=shared_bias)
    loss, dfeatures, dprototypes, dbias, dtemperature = run(cuda, c)
    assert loss == 0 and dfeatures.shape == c.features.shape and not dprototypes.any() and not dbias.any()
    assert dtemperature == 0


@pytest.mark.parametrize("alone", ALL._fields)
@pytest.mark.parametrize("num_classes", [5, 330])
def test_a_gradient_alone_is_the_same_as_with_the_others(cuda, alone, num_classes):
    c = problem((2, 70, 5, 9), num_classes, **OPTIONS["all with labels"])
    index = 1 + ALL._fields.index(alone)
    got = run(cuda, c, Wanted(**{alone: True}))
    assert torch.equal(got[index], run(cuda, c)[index])
    assert all(t.numel() == 0 for i, t in enumerate(got) if i not in (0, index))


# ---- through the public op ------------------------------------------------------------------------------------------


def public(c: Contrast, compiled: bool = False) -> list[Tensor]:
    leaves = [c.features, c.prototypes, c.bias, c.temperature]
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in leaves]
    names = ("class_weight", "pixel_weight", "variances", "positive_variance", "normalize", "ignore_index", "reduction",
             "label_smoothing", "margin", "loss")  # fmt: skip
    settings = {name: getattr(c, name) for name in names} | {"backend": "cuda"}
    denominator = "labelled" if c.denominator is None else c.denominator

    def loss(features, prototypes, bias, temperature):
        return sf.prototype_contrastive_loss(
            features, c.labels, prototypes, bias=bias, temperature=temperature, denominator=denominator, **settings
        )

    loss = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    value = loss(*leaves)
    given = [t for t in leaves if isinstance(t, Tensor)]
    return [value.detach(), *torch.autograd.grad(value, given)]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_public_op_gives_what_the_kernels_give(cuda, name):
    c = problem(**OPTIONS[name])
    given = [True, True, True, c.bias is not None, isinstance(c.temperature, Tensor)]
    expected = [t for t, wanted in zip(run(cuda, c), given, strict=True) if wanted]
    torch.testing.assert_close(public(c), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["all with labels", "probabilities, smoothing and weights"])
@pytest.mark.parametrize("num_classes", [5, 330])
def test_compiled_whole_and_the_same_bits(cuda, name, num_classes):
    c = problem((1, 20, 3, 5), num_classes, **OPTIONS[name])
    assert all(torch.equal(a, b) for a, b in zip(public(c), public(c, compiled=True), strict=True))
