"""The losses of up-sampled logits in value and gradient, on every backend that runs here, against F.interpolate in float64."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from layouts import LABEL_DTYPES, LAYOUTS, laid_out
from on_backends import (
    ALL,
    assert_same_bits,
    check,
    check_ops,
    home,
    on_each_backend,
    on_each_dtype,
    poison,
    run,
    usable,
)
from problems import BINARY, CROSS, UPSAMPLED_KINDS, UPSAMPLED_OPTIONS, named, problem, unless_slow
from shapes import on_each_shape

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
EVERY = usable(CROSS, among=ALL)
OPTIONS = [row for op in (CROSS, BINARY) for row in on_each_backend(op, [o for o in UPSAMPLED_OPTIONS if o.op == op])]
# the C++ kernels are held to the rule without more slack
SLACK = {"cpu": 4.0}


def agrees(backend: str, option, p, incoming=None, **more) -> None:
    slack = SLACK.get(backend, 16.0)
    check(option.op, option.given(p, **more), ("logits",), backend, slack=slack, incoming=incoming)


def differentiated(backend: str | None, function=sf.upsampled_cross_entropy, **given):
    return run(function, given, ("logits",), backend)


@pytest.mark.parametrize(("backend", "shape"), on_each_shape(CROSS))
def test_every_shape_is_as_accurate_as_eager(backend, shape):
    (plain,) = named(UPSAMPLED_OPTIONS, "plain")
    for align_corners in (True, False):
        agrees(backend, plain, shape.problem(), align_corners=align_corners, temperature=1.8)


# up by a whole and by a broken ratio, the same size, down, one node, wider than a tile of cells
SIZES = [
    ((3, 5), (12, 20)),
    ((3, 4), (13, 17)),
    ((3, 5), (3, 5)),
    ((7, 9), (4, 3)),
    ((1, 1), (4, 4)),
    ((2, 35), (3, 70)),
]


@pytest.mark.parametrize(
    ("backend", "case", "low", "high"),
    [
        pytest.param(*row.values, *size, id=f"{row.id}-{number}")
        for number, size in enumerate(SIZES)
        for row in unless_slow(OPTIONS)
        if row.values[0] != "triton" or (UPSAMPLED_KINDS.index(row.values[1]) + number) % 2 == 0  # half of the kinds
    ],
)
def test_an_option_of_every_size_ratio(backend, case, low, high):
    for align_corners in (True, False):
        agrees(backend, case, problem((2, 1, *low), 4, high, seed=1), align_corners=align_corners)


@pytest.mark.parametrize(("backend", "case"), OPTIONS)
def test_an_upsampled_option_changes_value_and_gradient_as_the_formula_says(backend, case):
    for align_corners in (True,) if backend == "triton" else (True, False):
        agrees(backend, case, problem((2, 1, 3, 4), 4, (10, 13), seed=2), align_corners=align_corners)


@pytest.mark.parametrize("size", [(33, 70), (60, 140)])
@pytest.mark.parametrize(("backend", "case"), [row for row in OPTIONS if row.values[0] in ("cpu", "cuda")])
def test_an_option_over_several_panels_and_tiles(backend, case, size):
    if backend == "cuda":  # the emulator is slow
        size = (size[0] // 3, size[1])
    for align_corners in (True, False):
        agrees(backend, case, problem((2, 1, 9, 11), 7, size), align_corners=align_corners)


@pytest.mark.parametrize("grid", [(2, 5), (6, 17), (13, 17)])
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        row for row in OPTIONS
        if "probabilities" in row.values[1].needs
        if row.values[0] != "triton" or row.values[1].name == "probabilities, weights, smoothing"
    ],
)  # fmt: skip
def test_probabilities_may_have_a_grid_of_their_own(backend, case, grid):
    for align_corners in (True, False) if backend != "triton" else (grid != (6, 17),):
        agrees(backend, case, problem((2, 1, 3, 4), 4, (13, 17), grid=grid), align_corners=align_corners)


@pytest.mark.parametrize("height", [23, 100])
@pytest.mark.parametrize("grid", [(50, 9), None])
@pytest.mark.parametrize(
    "case", named(UPSAMPLED_OPTIONS, "smoothing, weights, temperature", "probabilities, weights, smoothing", "focal, weights"),
    ids=lambda case: case.name,
)  # fmt: skip
@pytest.mark.parametrize("backend", ["cpu"] if "cpu" in EVERY else [])
def test_bands_of_many_rows_of_nodes_pass_over_and_stay_between_them(backend, case, grid, height):
    for align_corners in (True, False):
        agrees(backend, case, problem((8, 1, 70, 6), 5, (height, 13), grid=grid), align_corners=align_corners)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(CROSS))
def test_weights_reductions_and_dtypes(backend, dtype, reduction):
    (weights,) = named(UPSAMPLED_OPTIONS, "weights, temperature")
    for low, high in (((2, 3), (9, 11)), *([((5, 7), (33, 50))] if backend != "triton" else [])):
        agrees(backend, weights, problem((2, 1, *low), 5, high, dtype), reduction=reduction, temperature=1.0)


@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(CROSS, "label_smoothing"))
def test_the_gradient_of_half_floats_is_rounded_once(backend, dtype):
    (case,) = named(UPSAMPLED_OPTIONS, "smoothing, weights, temperature")
    p = problem((2, 1, 2, 3), 4, (9, 11), dtype)
    slack = 2 if dtype != torch.float32 else SLACK.get(backend, 16.0)
    check(CROSS, case.given(p, temperature=1.0, label_smoothing=0.1), ("logits",), backend, slack=slack)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 100.0])
@pytest.mark.parametrize("backend", EVERY)
def test_no_temperature_costs_accuracy(backend, temperature):
    (plain,) = named(UPSAMPLED_OPTIONS, "plain")
    agrees(backend, plain, problem((1, 1, 5, 4), 3, (18, 30)), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize(
    ("backend", "smoothing"),
    [(name, 0.0) for name in EVERY] + [(name, 0.3) for name in usable(CROSS, "label_smoothing", among=ALL)],
)
def test_the_gradient_at_a_low_temperature_is_not_off_by_the_rounding_of_the_logsumexp(backend, smoothing, temperature):
    """Logits in the hundreds and thousands: a logsumexp that is kept as one float32 is off by 1e-4 there."""
    p = problem((2, 1, 4, 5), 7, ignored=0, scale=20.0)
    settings = {"logits": p.logits, "reduction": "sum", "label_smoothing": smoothing}

    def eager(logits, dtype=None, **more):
        return F.cross_entropy(logits / temperature, p.labels, **more)

    eager32, truth = (run(eager, settings, ("logits",), leaf_dtype=t)[1] for t in (torch.float32, torch.float64))
    got = differentiated(backend, **settings, labels=p.labels, temperature=temperature)[1]
    allowed = max(2 * (eager32.double() - truth).abs().max(), 4e-7 * truth.abs().max())
    assert (got.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("high", [(8, 12), (24, 36), (3, 2)])
@pytest.mark.parametrize("backend", EVERY)
def test_logits_so_far_apart_that_the_corner_bound_underflows(backend, high):
    """Neighbouring nodes hundreds apart: exponentials against a cell's largest corner are all 0; each pixel's own maximum must be found."""
    (plain,) = named(UPSAMPLED_OPTIONS, "plain")
    agrees(backend, plain, problem((1, 1, 2, 3), 3, high, scale=300.0, seed=1), temperature=0.5)
    p = problem((1, 1, 9, 3), 3, (36, 12), seed=1)  # wide in the first group of cells, narrow in the second
    p.logits[:, 1, 0] = 200.0
    agrees(backend, plain, p)


@pytest.mark.parametrize("size", [(64, 96), (5, 7)], ids=["up", "down"])
@pytest.mark.parametrize("backend", [name for name in EVERY if name != "triton"])
def test_a_bound_far_above_every_logit_does_no_harm(backend, size):
    """Between two nodes that are sure of different classes, what bounds a pixel's logits lies 1000 above the largest of them."""
    p = problem((1, 1, 8, 12), 3, size if backend != "cuda" else (size[0] // 2, size[1] // 2))
    p.logits.fill_(-1000.0)
    p.logits[:, 0, ::2], p.logits[:, 1, 1::2] = 1000.0, 1000.0
    given = {"logits": p.logits, "labels": torch.zeros_like(p.labels, dtype=torch.uint8)}
    check(CROSS, given, ("logits",), backend, incoming=torch.ones(()))
    confidence = sf.upsampled_prediction(p.logits.to(home(backend)), p.size, backend=backend).confidence.cpu()
    torch.testing.assert_close(
        confidence.double(), oracle.prediction(p.logits, p.size)["confidence"], rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("backend", EVERY)
def test_certain_pixels_keep_their_small_loss(backend):
    p = problem((1, 1, 3, 4), 3, (12, 17))
    p.logits[:, 1] += 17.0
    (plain,) = named(UPSAMPLED_OPTIONS, "plain")
    agrees(backend, plain, p._replace(labels=torch.ones_like(p.labels)))


@pytest.mark.parametrize(("dtype", "layout"), list(zip(LABEL_DTYPES, itertools.cycle(LAYOUTS), strict=False)))
@pytest.mark.parametrize("backend", EVERY)
def test_labels_of_any_integer_dtype_and_maps_of_any_layout_give_the_same_bits(backend, dtype, layout):
    p = problem((2, 1, 3, 4), 3, (7, 9)) if backend != "triton" else problem((2, 1, 2, 3), 3, (4, 5))
    labels = p.labels.where(p.labels != 255, 100)
    expected = differentiated(backend, logits=p.logits, labels=labels, ignore_index=100)
    turned = labels.to(dtype).mT.contiguous().mT
    got = differentiated(backend, logits=laid_out(p.logits, layout), labels=turned, ignore_index=100)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("backend", "num_classes"), [(b, k) for b in EVERY for k in (6, 19, 1000) if k == 6 or b != "triton"]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upsampled_losses_have_the_same_bits_for_any_number_of_threads(backend, num_classes, reduction):
    shape, high = ((2, 1, 33, 65), (132, 260)) if backend not in ("triton", "cuda") else ((1, 1, 9, 34), (40, 140))
    if backend == "triton" or backend == "cuda" and num_classes > 6:
        shape, high = (1, 1, 3, 5), (11, 13)
    p = problem(shape, num_classes, high if num_classes < 1000 else (35, 70))
    assert_same_bits(backend, lambda: differentiated(backend, logits=p.logits, labels=p.labels, reduction=reduction))


@pytest.mark.parametrize(("backend", "case"), [row for row in OPTIONS if row.values[0] in ("cpu", "cuda")])
def test_an_upsampled_option_gives_the_same_bits_for_any_number_of_threads(backend, case):
    p = problem((2, 1, 9, 11), 7, (60, 140) if backend == "cpu" else (13, 40))
    assert_same_bits(backend, lambda: run(getattr(sf, case.op), case.given(p), ("logits",), backend))


@pytest.mark.parametrize("backend", EVERY)
def test_every_element_of_the_upsampled_loss_and_its_gradient_is_written(backend, monkeypatch):
    p = problem((1, 1, 3, 33), 3, (7, 40))
    expected = differentiated(backend, logits=p.logits, labels=p.labels)
    poison(monkeypatch)
    got = differentiated(backend, logits=p.logits, labels=p.labels)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert differentiated(backend, logits=p.logits, labels=p.labels, reduction="none")[0].isfinite().all()


@pytest.mark.parametrize("case", UPSAMPLED_OPTIONS, ids=lambda case: f"{case.name}-{case.op}")
def test_the_reference_of_the_upsampled_losses_is_exact_in_float64(case):
    p = problem((2, 1, 3, 4), 4, (10, 13), torch.float64)
    given = case.given(p) | ({"gamma": case.given(p).get("gamma", 0.0)} if case.op == BINARY else {})
    got = run(getattr(sf, case.op), given, ("logits",), "reference")
    for g, t in zip(got, run(oracle.upsampled, given, ("logits",)), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize(
    ("backend", "weighted"),
    [
        (backend, weighted)
        for backend in usable(CROSS, "label_smoothing", "probabilities", among=ALL)
        for weighted in (False, True)
        if weighted or backend != "triton"
    ],
)
def test_at_equal_size_it_is_cross_entropy(backend, soft, reduction, smoothing, weighted):
    p = problem((2, 1, 5, 7), 4)
    labels = p.logits.detach().flip(1).softmax(1) if soft else p.labels
    given = {
        "logits": p.logits,
        "labels": labels,
        "class_weight": torch.tensor([0.3, 1.0, 2.0, 0.7]) if weighted else None,
    }
    common = {"reduction": reduction, "label_smoothing": smoothing} | ({} if soft else {"ignore_index": 255})

    def theirs(logits, labels, class_weight, **more):
        wide = lambda t: t.to(logits.dtype) if t is not None and t.is_floating_point() else t  # noqa: E731
        return F.cross_entropy(logits, wide(labels), weight=wide(class_weight), **more)

    got = run(sf.upsampled_cross_entropy, given, ("logits",), backend, **common)
    eager, truth = (run(theirs, given, ("logits",), leaf_dtype=t, **common) for t in (torch.float32, torch.float64))
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=16)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        row
        for row in OPTIONS
        if row.values[1].name in ("plain", "probabilities, map")
        or row.values[1].name in ("a denominator", "focal")
        and row.values[0] != "triton"
    ],
)
def test_opcheck_compile_export_and_a_loss_scale(backend, case):
    torch._dynamo.reset()
    p = problem((2, 1, 3, 4), 4, (10, 13)) if backend != "triton" else problem((1, 1, 2, 3), 4, (5, 6))
    settings = case.given(p)
    logits, labels = settings.pop("logits").to(home(backend)), settings.pop("labels").to(home(backend))
    settings = {k: v.to(home(backend)) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}

    def loss(logits, labels):
        return getattr(sf, case.op)(logits, labels, backend=backend, **settings) * 2.0**16

    leaf = logits.clone().requires_grad_()
    check_ops(lambda: loss(leaf, labels).sum().backward(), backend=backend)
    given = {"logits": logits, "labels": labels}
    eager = run(loss, given, ("logits",))
    compiled = run(torch.compile(loss, fullgraph=True, backend="aot_eager"), given, ("logits",))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))

    class Module(torch.nn.Module):
        def forward(self, logits, labels):
            return loss(logits, labels)

    exported = torch.export.export(Module(), (logits, labels)).module()
    assert torch.equal(exported(logits, labels), loss(logits, labels))  # without a gradient, as it was exported


def test_gradcheck_and_no_second_gradient():
    p = problem((2, 1, 3, 4), 5, (7, 9), torch.float64)
    logits = p.logits.requires_grad_()
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda x, r=reduction: sf.upsampled_cross_entropy(x, p.labels, reduction=r), (logits,), fast_mode=True
        )
    (grad,) = torch.autograd.grad(sf.upsampled_cross_entropy(logits, p.labels), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
