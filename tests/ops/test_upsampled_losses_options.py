"""The options of upsampled_cross_entropy, and upsampled_binary_cross_entropy, on every backend that has them, against F.interpolate."""

from __future__ import annotations

from typing import NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from problems import ALL, check_ops, usable

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
CROSS, BINARY = "upsampled_cross_entropy", "upsampled_binary_cross_entropy"
SIZES = [((3, 4), (10, 13)), ((3, 5), (3, 5)), ((7, 9), (4, 3))]


class Case(NamedTuple):
    name: str
    op: str
    needs: tuple[str, ...]
    settings: dict
    soft: bool = False


CASES = (
    Case("smoothing", CROSS, ("label_smoothing",), {"label_smoothing": 0.15}),
    Case("smoothing, weights, temperature", CROSS, ("label_smoothing",), {"label_smoothing": 0.15, "weights": True, "temperature": 1.8}),
    Case("all pixels", CROSS, ("denominator",), {"denominator": "all", "weights": True}),
    Case("a denominator", CROSS, ("denominator",), {"denominator": torch.tensor(7.5)}),
    Case("probabilities", CROSS, ("probabilities",), {}, True),
    Case("probabilities, weights, smoothing", CROSS, ("probabilities", "label_smoothing"), {"label_smoothing": 0.1, "weights": True}, True),
    Case("probabilities, map", CROSS, ("probabilities",), {"reduction": "none"}, True),
    Case("binary", BINARY, (), {"gamma": 0.0}),
    Case("binary, weights, temperature", BINARY, (), {"gamma": 0.0, "weights": True, "temperature": 1.8}),
    Case("binary, all pixels", BINARY, ("denominator",), {"gamma": 0.0, "denominator": "all"}),
    Case("binary, map", BINARY, (), {"gamma": 0.0, "reduction": "none"}),
    Case("focal", BINARY, ("focal",), {"gamma": 2.0}),
    Case("focal, weights, sum", BINARY, ("focal",), {"gamma": 1.5, "weights": True, "reduction": "sum"}),
)  # fmt: skip
EACH = [
    pytest.param(backend, case, id=f"{case.name}-{backend}") for case in CASES for backend in usable(case.op, *case.needs, among=ALL)
]  # fmt: skip


def problem(case: Case, low, high, dtype=torch.float32, num_classes=4):
    generator = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(2, num_classes, *low, generator=generator)).to(dtype)
    labels = torch.randint(0, num_classes, (2, *high), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    settings = dict(case.settings)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if settings.pop("weights", False):
        settings |= {"class_weight": torch.rand(num_classes, generator=generator, dtype=wide) + 0.1,
                     "pixel_weight": torch.rand(labels.shape, generator=generator, dtype=wide)}  # fmt: skip
    if case.soft:
        labels = torch.randn(2, num_classes, *low, generator=generator).softmax(1)
        settings["size"] = high
    return logits, labels, settings


def run(function, logits, labels, **settings):
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(logits, labels, **settings)
    value.backward(torch.linspace(0.5, 2, value.numel()).view(value.shape).to(value.dtype))
    return value.detach(), logits.grad


@pytest.mark.parametrize(
    ("low", "high", "align_corners"), [(*SIZES[0], True), (*SIZES[0], False), (*SIZES[1], True), (*SIZES[2], False)]
)
@pytest.mark.parametrize(("backend", "case"), EACH)
def test_value_and_gradient_follow_the_formula(backend, case, low, high, align_corners):
    logits, labels, settings = problem(case, low, high)
    settings["align_corners"] = align_corners
    got = run(getattr(sf, case.op), logits, labels, backend=backend, **settings)
    eager = run(oracle.upsampled_with_options, logits, labels, dtype=torch.float32, **settings)
    truth = run(oracle.upsampled_with_options, logits.double(), labels, **settings)
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_is_exact_in_float64(case):
    logits, labels, settings = problem(case, *SIZES[0], dtype=torch.float64)
    got = run(getattr(sf, case.op), logits, labels, backend="reference", **settings)
    for g, t in zip(got, run(oracle.upsampled_with_options, logits, labels, **settings), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("backend", "case"), EACH)
def test_nothing_labelled_gives_0_and_a_gradient_of_exactly_0(backend, case):
    logits, labels, settings = problem(case, *SIZES[0])
    nothing = torch.zeros_like(labels) if case.soft else torch.full_like(labels, 255)
    for part in run(getattr(sf, case.op), logits, nothing, backend=backend, **settings):
        assert (part == 0).all()


@pytest.mark.parametrize(("backend", "case"), [p for p in EACH if p.values[1].name in
                                               ("a denominator", "probabilities, map", "focal")])  # fmt: skip
def test_opcheck_compile_and_export(backend, case):
    torch._dynamo.reset()
    logits, labels, settings = problem(case, *SIZES[0])

    def loss(logits, labels):
        return getattr(sf, case.op)(logits, labels, backend=backend, **settings) * 2.0**8

    leaf = logits.clone().requires_grad_()
    check_ops(
        lambda: loss(leaf, labels).sum().backward(),
        *(("test_schema", "test_faketensor") if backend == "triton" else ()),
    )
    eager, compiled = (
        run(loss, logits, labels),
        run(torch.compile(loss, fullgraph=True, backend="aot_eager"), logits, labels),
    )
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))

    class Module(torch.nn.Module):
        def forward(self, logits, labels):
            return loss(logits, labels)

    assert torch.equal(torch.export.export(Module(), (logits, labels)).module()(logits, labels), eager[0])


@pytest.mark.parametrize("backend", usable(CROSS, "label_smoothing", "probabilities", among=ALL))
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_at_equal_size_it_is_cross_entropy(backend, soft, reduction, smoothing, weighted):
    logits, labels, _ = problem(CASES[4] if soft else CASES[0], (5, 7), (5, 7))
    weight = torch.tensor([0.3, 1.0, 2.0, 0.7]) if weighted else None
    common = {"reduction": reduction, "label_smoothing": smoothing} | ({} if soft else {"ignore_index": 255})
    got = run(sf.upsampled_cross_entropy, logits, labels, class_weight=weight, backend=backend, **common)
    eager = run(F.cross_entropy, logits, labels, weight=weight, **common)
    target = labels.double() if soft else labels
    truth = run(F.cross_entropy, logits.double(), target, weight=None if weight is None else weight.double(), **common)
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=16)


# ---------------------------------------------------------------------------------------------- masked classes


@pytest.mark.parametrize("op", [CROSS, BINARY])
@pytest.mark.parametrize("low_logit", [-3.4e38, -2.4e38, -1e30])
@pytest.mark.parametrize("high", [(5, 7), (21, 26)])
def test_finite_logits_however_low_give_a_finite_loss(op, low_logit, high):
    logits, labels, _ = problem(CASES[0], (5, 7), high)
    logits[:, 3], labels = low_logit, labels.where(labels != 3, 255)
    for backend in usable(op, among=("reference", "cpu", "triton")):
        got = run(getattr(sf, op), logits, labels, backend=backend)
        kept = run(getattr(sf, op), logits[:, :3], labels, backend="reference")
        torch.testing.assert_close(got[0], kept[0])
        torch.testing.assert_close(got[1][:, :3], kept[1], rtol=1e-4, atol=1e-7)
        assert (got[1][:, 3].abs() < 1e-20).all()


@pytest.mark.parametrize("op", [CROSS, BINARY])
@pytest.mark.parametrize("high", [(5, 7), (21, 26)])
def test_a_class_that_is_minus_infinity_everywhere_has_probability_0(op, high):
    logits, labels, _ = problem(CASES[0], (5, 7), high)
    logits[:, 3], labels = -torch.inf, labels.where(labels != 3, 255)
    kept = run(getattr(sf, op), logits[:, :3], labels, backend="reference")
    for backend in usable(op, among=("reference", "cpu", "triton")):
        got = run(getattr(sf, op), logits, labels, backend=backend)
        torch.testing.assert_close(got[0], kept[0])
        torch.testing.assert_close(got[1][:, :3], kept[1], rtol=1e-4, atol=1e-7)
        assert (got[1][:, 3] == 0).all()


@pytest.mark.parametrize("backend", usable(CROSS, among=ALL))
def test_a_class_that_is_minus_infinity_at_some_nodes_is_so_only_where_they_count(backend):
    """At equal size nothing is mixed: as F.cross_entropy."""
    logits, labels, _ = problem(CASES[0], (5, 7), (5, 7))
    logits[:, 3, ::2, 1::3] = -torch.inf
    labels = labels.where(labels != 3, 0)
    got = run(sf.upsampled_cross_entropy, logits, labels, backend=backend)
    expected = run(F.cross_entropy, logits, labels, ignore_index=255)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("backend", usable("upsampled_prediction", among=ALL))
@pytest.mark.parametrize("high", [(5, 7), (21, 26)])
def test_a_masked_class_is_never_predicted(backend, high):
    logits, _, _ = problem(CASES[0], (5, 7), high)
    kept = sf.upsampled_prediction(logits[:, :3], high, backend="reference")
    logits[:, 3] = -torch.inf
    got = sf.upsampled_prediction(logits, high, backend=backend)
    torch.testing.assert_close(got.confidence, kept.confidence)
    assert (got.labels < 3).all() and (got.labels == kept.labels).float().mean() > 0.99


@pytest.mark.parametrize("backend", usable("upsampled_prediction", among=ALL))
def test_a_confidence_that_is_nan_reaches_no_threshold(backend):
    logits, _, _ = problem(CASES[0], (5, 7), (5, 7))
    logits[0, :, 2, 3] = torch.nan
    got = sf.upsampled_prediction(logits, (5, 7), thresholds=torch.zeros(4), backend=backend)
    ignored = got.labels == 255
    assert (
        ignored[0, 2, 3] and torch.equal(ignored, got.confidence.isnan()) and ignored.sum() <= 4
    )  # at most the node's own cells


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("change", "text"), [
    ({"labels": torch.rand(2, 3, 5, 7)}, "probabilities and must be"),
    ({"labels": -torch.rand(2, 4, 5, 7)}, "probability -"),
    ({"labels": torch.rand(2, 4, 5, 7), "size": (0, 3)}, "each at least 1"),
    ({"size": (9, 9)}, "integer labels say the size"),
    ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\]"),
    ({"denominator": "all", "reduction": "sum"}, "denominator=all and reduction='sum'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, text):
    given = {"logits": torch.ones(2, 4, 5, 7), "labels": torch.zeros(2, 10, 14, dtype=torch.long)}
    with pytest.raises(ValueError, match=text):
        sf.upsampled_cross_entropy(**given | change)
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        sf.upsampled_binary_cross_entropy(**given, gamma=-1.0)
