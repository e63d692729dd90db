"""The ops that return more than a loss, over the space of their inputs: drawn shapes, layouts, dtypes and options, against float64."""

from __future__ import annotations

import math
import os

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LABEL_DTYPES, LAYOUTS, laid_out
from on_backends import ALL, HALF_PRODUCTS, call, dtypes, run, usable
from problems import BINARY, CONFUSION, LOGITS

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
EXAMPLES = int(os.environ.get("SPCL_FAST_TEST_EXAMPLES", "200"))
_SHARE = {"cpu": 4, "reference": 10, "triton": 25, "cuda": 40}  # of the examples, one in so many


def drawn_by(backend: str, strategy: st.SearchStrategy, check) -> None:
    """`check(drawn)` for as many draws as the backend's speed allows."""
    settings(max_examples=max(2, EXAMPLES // _SHARE[backend]))(given(drawn=strategy)(lambda drawn: check(drawn)))()


def within_rounding(got, eager, truth, terms: float) -> None:
    """As the oracle's rule, plus a few float32 roundings of terms that cancel: there a lucky eager result is no measure."""
    truth = truth.double()
    error, allowed = ((value.double() - truth).abs().max().item() if value.numel() else 0.0 for value in (got, eager))
    largest = truth.abs().max().item() if truth.numel() else 0.0
    limit = 2 * allowed + 4 * torch.finfo(got.dtype).eps * largest + 2**-21 * terms
    assert got.shape == truth.shape and error <= limit, (
        f"error {error:.3e}; same-dtype eager has {allowed:.3e}, limit {limit:.3e}"
    )


# ---- prototype_logits ------------------------------------------------------------------------------------------------


@st.composite
def logits_problems(draw, kinds):
    """Arguments of prototype_logits, its leaves, and the incoming gradient's generator."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    batch, height, width = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 9, 33]))
    dim, rows = draw(st.sampled_from([2, 5, 16, 33, 70])), draw(st.sampled_from([1, 2, 7, 19, 34]))
    temperature = draw(st.sampled_from([0.05, 1.0, 100.0]))
    images = (batch,) if draw(st.booleans()) else ()
    dtype, of_rows = draw(st.sampled_from(kinds)), draw(st.sampled_from([torch.float32, torch.float32, torch.float16]))
    prototypes = F.normalize(randn(*images, rows, dim), dim=-1).to(of_rows)
    if draw(st.booleans()):  # strides of another order
        prototypes = prototypes.mT.contiguous().mT
    made = {
        "features": laid_out(randn(batch, dim, height, width).to(dtype), draw(st.sampled_from(LAYOUTS))),
        "prototypes": prototypes,
    }
    made["normalize"] = draw(st.booleans())
    made["temperature"] = torch.tensor(temperature) if draw(st.booleans()) else temperature
    bias = draw(st.sampled_from([None, (rows,), (batch, rows)]))
    if bias:
        made["bias"] = randn(*bias)
    if draw(st.booleans()):
        made["variances"] = torch.rand(prototypes.shape, generator=generator) * temperature**2
    if draw(st.booleans()):
        classes = draw(st.integers(1, rows))
        made["prototype_class"] = torch.randint(0, classes, (rows,), generator=generator)
        made["prototype_class"][0] = classes - 1
        made |= {"pool": draw(st.sampled_from(["logsumexp", "max"]))}
    leaves = [
        name for name in ("features", "prototypes", "bias", "temperature") if isinstance(made.get(name), torch.Tensor)
    ]
    return made, leaves


def of_rows_there(function):
    """0 for classes without a row, whose logit is -inf."""

    def finite(**arguments):
        value = function(**arguments)
        return value.where(value.isfinite(), 0)

    return finite


def check_logits(backend: str, made: dict, leaves: list[str]) -> None:
    half = made["features"].dtype if backend in HALF_PRODUCTS else torch.float32
    got = run(of_rows_there(sf.prototype_logits), made, leaves, backend)
    eager = run(of_rows_there(oracle.class_logits), made, leaves, dtype=half)
    truth = run(of_rows_there(oracle.class_logits), made, leaves, leaf_dtype=torch.float64)
    x, tau = made["features"].double(), float(made["temperature"])
    norm = x.norm(dim=1).clamp_min(1e-12) if made["normalize"] else torch.ones(())
    unit = (x.norm(dim=1) / norm).max().item()
    z = unit / tau + (0 if "bias" not in made else made["bias"].abs().max().item())
    if "variances" in made:
        z += 0.5 * unit**2 * made["variances"].abs().max().item() / tau**2
    rows, pixels = made["prototypes"].shape[-2], x[:, 0].numel()
    if "prototype_class" in made:  # shares are exponentials: what is rounded off a logit is a part of them
        z_part = 1 + z
    else:
        z_part = 1.0
    slope = unit / tau + (0 if "variances" not in made else unit * made["variances"].norm(dim=-1).max().item() / tau**2)
    ratio = torch.finfo(half).eps / torch.finfo(torch.float32).eps if backend in HALF_PRODUCTS else 1
    scales = {
        "logits": z, "features": 2 * z_part * rows * (1 + slope * tau) / tau / norm.min().item(),
        "prototypes": 2 * z_part * pixels * unit / tau, "bias": 2 * z_part * pixels, "temperature": 2 * z_part * rows * pixels * z / tau,
    }  # fmt: skip
    for name, g, e, t in zip(("logits", *leaves), got, eager, truth, strict=True):
        try:
            within_rounding(g, e, t, scales[name] * ratio)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("backend", usable(LOGITS, "variances", "bias", "prototype_class", among=ALL))
def test_prototype_logits_and_their_gradients_wherever_their_inputs_lie(backend):
    drawn_by(backend, logits_problems(dtypes(backend)), lambda drawn: check_logits(backend, *drawn))


# ---- the up-sampled ops ----------------------------------------------------------------------------------------------


@st.composite
def upsampled_problems(draw, kinds):
    """Logits, labels and align_corners; ratios up and down, sizes of 1."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, height, width = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 7, 34]))
    classes = draw(st.sampled_from([1, 2, 5, 19, 34]))
    size = (
        draw(st.sampled_from([1, height, 3 * height + 1])),
        draw(st.sampled_from([1, max(1, width // 3), width, 2 * width + 1])),
    )
    logits = torch.randn(batch, classes, height, width, generator=generator) * draw(st.sampled_from([0.1, 3.0, 30.0]))
    labels = torch.randint(0, classes, (batch, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 120
    logits = laid_out(logits.to(draw(st.sampled_from(kinds))), draw(st.sampled_from(LAYOUTS)))
    made = {"logits": logits, "labels": labels.to(draw(st.sampled_from(LABEL_DTYPES))), "ignore_index": 120}
    return made | {"align_corners": draw(st.booleans())}, draw, generator


@st.composite
def binary_problems(draw, kinds):
    made, _, generator = draw(upsampled_problems(kinds))
    if draw(st.booleans()):
        made["class_weight"] = torch.rand(made["logits"].shape[1], generator=generator)
    if draw(st.booleans()):
        made["pixel_weight"] = torch.rand(made["labels"].shape, generator=generator)
    made["gamma"] = draw(st.sampled_from([0.0, 0.0, 0.5, 2.0]))
    made["temperature"] = draw(st.sampled_from([0.3, 1.0, 1.8]))
    return made | {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}


def check_binary(backend: str, made: dict) -> None:
    got = run(sf.upsampled_binary_cross_entropy, made, ["logits"], backend)
    if (made["labels"] == 120).all():
        assert all(torch.all(part == 0) for part in got)
        return
    eager = run(oracle.upsampled, made, ["logits"], dtype=torch.float32)
    truth = run(oracle.upsampled, made, ["logits"], leaf_dtype=torch.float64)
    logits, labels = made["logits"], made["labels"]
    largest = logits.double().abs().max().item() / made["temperature"]
    pixels = max(1, math.ceil(labels[0].numel() / logits[0, 0].numel())) * 4 if made["reduction"] != "mean" else 1
    sums = labels.numel() if made["reduction"] == "sum" else 1
    terms = (
        sums * logits.shape[1] * (1 + largest),
        2 * pixels * (1 + largest) * (1 + made["gamma"]) / made["temperature"],
    )
    for g, e, t, scale in zip(got, eager, truth, terms, strict=True):
        within_rounding(g, e, t, scale)


@pytest.mark.parametrize("backend", usable(BINARY, "focal", among=ALL))
def test_upsampled_binary_cross_entropy_wherever_its_inputs_lie(backend):
    drawn_by(backend, binary_problems(dtypes(backend)), lambda drawn: check_binary(backend, drawn))


def check_confusion(backend: str, made: dict) -> None:
    """Exact, but for pixels whose two best logits are one and the same up to rounding: those are given no label."""
    logits, labels = made["logits"], made["labels"].long()
    size = {"size": tuple(labels.shape[1:]), "mode": "bilinear", "align_corners": made["align_corners"]}
    best, first = F.interpolate(logits.double(), **size).topk(min(2, logits.shape[1]), 1)
    if logits.shape[1] > 1:
        labels = labels.masked_fill(best[:, 0] - best[:, 1] < 1e-5 * logits.abs().max().double(), 120)
    there, classes = labels != 120, logits.shape[1]
    pairs = labels[there] * classes + first[:, 0][there]
    expected = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    got = call(sf.upsampled_confusion, backend, **made | {"labels": labels.to(made["labels"].dtype)})
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", usable(CONFUSION, among=ALL))
def test_upsampled_confusion_wherever_its_inputs_lie(backend):
    drawn_by(backend, upsampled_problems(dtypes(backend)), lambda drawn: check_confusion(backend, drawn[0]))


# ---- balance_ --------------------------------------------------------------------------------------------------------


@st.composite
def balance_problems(draw, kinds):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, classes, dim = (
        draw(st.sampled_from([1, 5, 40, 130])),
        draw(st.sampled_from([1, 3, 33, 100])),
        draw(st.integers(1, 40)),
    )

    def unit(count):
        values = F.normalize(torch.randn(count, dim, generator=generator), dim=1).to(draw(st.sampled_from(kinds)))
        return values.mT.contiguous().mT if draw(st.booleans()) else values

    made = {"features": unit(rows), "prototypes": unit(classes), "temperature": draw(st.sampled_from([0.02, 0.1, 1.0]))}
    if draw(st.booleans()):
        made["class_share"] = torch.rand(classes, generator=generator).softmax(0)
    return made | {"iterations": draw(st.integers(1, 3))}


def sinkhorn(features, prototypes, *, temperature, iterations, class_share=None, dtype=torch.float64):
    """u, v of balance_, from the matrix of all scores."""
    scores = features.to(dtype) @ prototypes.to(dtype).T / temperature
    count, classes = scores.shape
    share = torch.full((classes,), 1 / classes, dtype=dtype) if class_share is None else class_share.to(dtype)
    u = scores.new_zeros(count)
    for _ in range(iterations):
        v = (count * share).log() - (scores + u[:, None]).logsumexp(0)
        u = -(scores + v).logsumexp(1)
    return u, v


def check_balance(backend: str, made: dict) -> None:
    got = call(sf.balance_, backend, **made)
    eager, truth = (sinkhorn(**made, dtype=dtype) for dtype in (torch.float32, torch.float64))
    for g, e, t in zip(got, eager, truth, strict=True):
        assert g.dtype == torch.float32
        within_rounding(g, e, t, made["iterations"] * (1 + 2 / made["temperature"]))


@pytest.mark.parametrize("backend", usable("balance_", among=ALL))
def test_balance_wherever_its_inputs_lie(backend):
    drawn_by(backend, balance_problems(dtypes(backend)), lambda drawn: check_balance(backend, drawn))
