"""prototype_logits on every backend that has it, against the formula in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from layouts import as_rows
from on_backends import ALL, HALF_PRODUCTS, check_ops, dtypes, home, on_each_backend, run, usable
from problems import LOGITS, OPTIONS, Option, problem

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
_OF_LOSSES = (
    "labels",
    "class_weight",
    "pixel_weight",
    "reduction",
    "label_smoothing",
    "margin",
    "positive_variance",
    "denominator",
    "loss",
)
_NEEDS_OF_LOSSES = {
    "probabilities",
    "teacher",
    "label_smoothing",
    "margin",
    "no_positive_variance",
    "denominator",
    "sigmoid",
}
CASES = [case for case in OPTIONS if not _NEEDS_OF_LOSSES & set(case.needs)]
EVERY = usable(LOGITS, "bias", among=ALL)


def logits_given(case: Option, p) -> dict:
    return {name: value for name, value in case.given(p).items() if name not in _OF_LOSSES}


def finite(function):
    """The function with 0 for the logits of classes without a row."""

    def of_rows(**given):
        value = function(**given)
        return value.where(value.isfinite(), 0)

    return of_rows


def agrees(backend: str, given: dict, leaves, dtype: torch.dtype) -> None:
    given_incoming = torch.linspace(-1, 2, sf.prototype_logits(**given).numel())
    incoming = given_incoming.view(sf.prototype_logits(**given).shape)
    got = run(finite(sf.prototype_logits), given, leaves, backend, incoming=incoming)
    eager_dtype = dtype if backend in HALF_PRODUCTS else torch.float32
    eager = run(finite(oracle.class_logits), given, leaves, dtype=eager_dtype, incoming=incoming)
    truth = run(finite(oracle.class_logits), given, leaves, leaf_dtype=torch.float64, incoming=incoming)
    for name, g, e, t in zip(("logits", *leaves), got, eager, truth, strict=True):
        ratio = max(1.0, torch.finfo(dtype).eps / torch.finfo(g.dtype).eps) if backend in HALF_PRODUCTS else 1.0
        try:
            # the gradient of the temperature is one sum that cancels
            oracle.assert_as_accurate(g, e, t, slack=ratio * (32 if name == "temperature" else 4))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half floats"])
@pytest.mark.parametrize(("backend", "case"), on_each_backend(LOGITS, CASES))
def test_logits_and_every_gradient_follow_the_formula(backend, case, half):
    for dtype in dtypes(backend)[1:] if half else [torch.float32]:
        p = problem((2, 40, 3, 5), 7, dtype=dtype)
        agrees(backend, logits_given(case, p), case.leaves, dtype)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize(("backend", "case"), on_each_backend(LOGITS, CASES))
def test_no_temperature_costs_logits_accuracy(backend, case, temperature):
    p = problem((2, 24, 3, 7), temperature=temperature)
    given = logits_given(case, p)
    given["temperature"] = given["temperature"] if "temperature" in case.leaves else temperature
    agrees(backend, given, case.leaves, torch.float32)


@pytest.mark.parametrize("backend", EVERY)
def test_rows_sequences_and_volumes_have_their_own_layout(backend):
    p = problem((2, 16, 3, 4))
    common = {"temperature": 0.5, "bias": p.bias, "prototypes": p.prototypes}

    def logits(features):
        return run(sf.prototype_logits, common | {"features": features}, ("features",), backend)[0]

    image = logits(p.features)
    torch.testing.assert_close(logits(as_rows(p.features)), as_rows(image))
    torch.testing.assert_close(logits(p.features.flatten(2)), image.flatten(2))
    torch.testing.assert_close(logits(p.features.unflatten(2, (1, 3))), image.unflatten(2, (1, 3)))


@pytest.mark.parametrize("backend", EVERY)
def test_opcheck_compile_and_a_head_of_two_ops(backend):
    torch._dynamo.reset()
    p = problem((1, 16, 3, 5), size=(12, 20), ignored=0)
    labels = p.labels.to(home(backend))

    def head(features, prototypes, bias):
        logits = sf.prototype_logits(features, prototypes, temperature=1.0, normalize=False, bias=bias, backend=backend)
        return sf.upsampled_cross_entropy(logits, labels)

    leaves = [t.to(home(backend)).requires_grad_() for t in (p.features, p.prototypes, p.bias)]
    check_ops(lambda: head(*leaves).backward(), "test_schema", "test_faketensor")
    eager = torch.autograd.grad(head(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(head, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    conv = F.conv2d(leaves[0], leaves[1][:, :, None, None], leaves[2])
    expected = torch.autograd.grad(
        F.cross_entropy(F.interpolate(conv, (12, 20), mode="bilinear", align_corners=True), labels), leaves
    )
    for g, e in zip(eager, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_a_second_derivative_of_the_logits_is_refused_with_a_reason():
    p = problem()
    features = p.features.requires_grad_()
    logits = sf.prototype_logits(features, p.prototypes, temperature=1.0)
    (grad,) = torch.autograd.grad(logits.sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="prototype_logits is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 3, 4), (2, 8, 0, 4)])
@pytest.mark.parametrize("backend", usable(LOGITS, among=ALL))
def test_no_pixel_has_no_logits(backend, shape):
    features = torch.zeros(shape, device=home(backend), requires_grad=True)
    prototypes = torch.ones(5, 8, device=home(backend), requires_grad=True)
    logits = sf.prototype_logits(features, prototypes, temperature=1.0, backend=backend)
    logits.sum().backward()
    assert logits.shape == (shape[0], 5, *shape[2:]) and features.grad.shape == shape and (prototypes.grad == 0).all()
