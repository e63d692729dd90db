"""Every option of prototype_contrastive_loss on every backend that has it and runs here, against the formula in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from problems import ALL, OPTIONS, Option, asked, check_ops, on_each_backend, options, usable

import spcl_fast as sf
from spcl_fast import backends

OP = "prototype_contrastive_loss"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter


def arguments(case: Option, problem) -> tuple[dict, dict]:
    """What is differentiated, and everything else."""
    given = {
        "features": problem.features,
        "labels": problem.labels,
        "prototypes": problem.prototypes,
        "temperature": 0.3,
    }
    given |= case.settings(problem)
    return {name: given.pop(name) for name in case.leaves}, given


def run(function, case: Option, problem, dtype: torch.dtype | None = None, **settings):
    """Value, and the gradient of each leaf for an incoming gradient that is none of 1s."""
    leaves, rest = arguments(case, problem)
    leaves = {
        name: leaf.detach().to(dtype or leaf.dtype).clone(memory_format=torch.preserve_format).requires_grad_()
        for name, leaf in leaves.items()
    }
    value = function(**leaves, **rest, **settings)
    incoming = torch.linspace(0.5, 2, value.numel()).view(value.shape).to(value.dtype)
    value.backward(incoming)
    return value.detach(), *(leaf.grad for leaf in leaves.values())


def check(backend: str, case: Option, problem, slack: float = 16.0) -> None:
    got = run(sf.prototype_contrastive_loss, case, problem, backend=backend)
    eager = run(oracle.contrast_with_options, case, problem, dtype=problem.features.dtype)
    truth = run(oracle.contrast_with_options, case, problem, torch.float64)
    half = torch.finfo(problem.features.dtype).eps
    for g, e, t in zip(got, eager, truth, strict=True):
        # what is not in the features' dtype (loss, dprototypes) still carries half-float products
        oracle.assert_as_accurate(g, e, t, slack=slack * max(1.0, half / torch.finfo(g.dtype).eps))


@pytest.mark.parametrize(("backend", "case"), on_each_backend(OP, OPTIONS))
def test_value_and_every_gradient_follow_the_formula(backend, case):
    check(backend, case, options())


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.name)
def test_the_reference_is_exact_in_float64(case):
    problem = options(dtype=torch.float64)
    got = run(sf.prototype_contrastive_loss, case, problem, backend="reference")
    for g, t in zip(got, run(oracle.contrast_with_options, case, problem), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "name",
    ["variances, bias and temperature", "pooled, weights, bias, temperature", "sigmoid, weights, bias, temperature"],
)
def test_gradcheck(name):
    case = next(case for case in OPTIONS if case.name == name)
    leaves, rest = arguments(case, options((1, 3, 2, 2), 3, dtype=torch.float64))
    names, tensors = leaves.keys(), [leaf.requires_grad_() for leaf in leaves.values()]
    torch.autograd.gradcheck(
        lambda *values: sf.prototype_contrastive_loss(**dict(zip(names, values, strict=True)), **rest), tensors
    )


SOME = tuple(
    case for case in OPTIONS
    if case.name in ("all per image", "variances, bias and temperature", "probabilities, weights, smoothing", "smoothing, weights",
                     "pooled, weights, bias, temperature", "margin, weights, temperature", "sigmoid, weights, bias, temperature")
)  # fmt: skip


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize(("backend", "case"), on_each_backend(OP, SOME))
def test_no_temperature_costs_accuracy(backend, case, temperature):
    problem = options(temperature=temperature)
    if "temperature" not in case.leaves:
        case = case._replace(settings=lambda o, settings=case.settings: settings(o) | {"temperature": temperature})
    check(backend, case, problem, slack=64)  # the temperature's gradient is a sum whose terms nearly cancel


@pytest.mark.parametrize(("backend", "case"), on_each_backend(OP, SOME))
def test_half_floats(backend, case):
    dtype = torch.float16 if backend == "triton" else torch.bfloat16  # Triton's interpreter multiplies bfloat16 wrongly
    check(backend, case, options(dtype=dtype, temperature=1.0))


@pytest.mark.parametrize("layout", ["channels_last", "rows", "sliced"])
@pytest.mark.parametrize(
    ("backend", "case"), on_each_backend(OP, tuple(c for c in SOME if "bias" in c.name or "smoothing" in c.name))
)
def test_any_layout_is_read(backend, case, layout):
    problem = options()
    expected = run(sf.prototype_contrastive_loss, case, problem, backend=backend)
    features, labels = oracle.laid_out(problem.features, problem.labels, layout)
    if layout == "rows":
        soft = problem.probabilities.permute(0, 2, 3, 1).flatten(0, 2)
        other = problem._replace(
            features=features, labels=labels, probabilities=soft, pixel_weight=problem.pixel_weight.flatten()
        )
    else:
        other = problem._replace(features=features)
    got = run(sf.prototype_contrastive_loss, case, other, backend=backend)
    torch.testing.assert_close(got[0], expected[0])
    rows = expected[1].permute(0, 2, 3, 1).flatten(0, 2) if layout == "rows" else expected[1]
    torch.testing.assert_close(got[1], rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backend", "case"), on_each_backend(OP, (*SOME, *(c for c in OPTIONS if "map" in c.name))))
def test_nothing_labelled_gives_0_and_gradients_of_exactly_0(backend, case):
    problem = options()
    problem.features[0, 0, 0, 0] = torch.nan  # never looked at
    nothing = problem._replace(
        labels=torch.full_like(problem.labels, 255), probabilities=torch.zeros_like(problem.probabilities)
    )
    for part in run(sf.prototype_contrastive_loss, case, nothing, backend=backend):
        assert (part == 0).all()


@pytest.mark.parametrize(("backend", "case"), on_each_backend(OP, tuple(c for c in SOME if "image" not in c.name)))
def test_an_empty_batch(backend, case):
    problem = options()
    empty = problem._replace(
        features=problem.features[:0], labels=problem.labels[:0], probabilities=problem.probabilities[:0],
        pixel_weight=problem.pixel_weight[:0],
    )  # fmt: skip
    value, dfeatures, *others = run(sf.prototype_contrastive_loss, case, empty, backend=backend)
    assert value == 0 and dfeatures.shape == empty.features.shape and all((part == 0).all() for part in others)


TRACED = ("all per image", "probabilities, weights, smoothing", "pooled, weights, bias, temperature")


@pytest.mark.parametrize(("backend", "case"), on_each_backend(OP, tuple(case for case in SOME if case.name in TRACED)))
def test_opcheck_compile_and_export(backend, case):
    torch._dynamo.reset()
    leaves, rest = arguments(case, options((1, 16, 3, 5)))
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    if case.name.startswith("pooled"):
        rest["num_classes"] = 5

    def loss(**leaves):
        return sf.prototype_contrastive_loss(**leaves, **rest, backend=backend)

    tests = ("test_schema", "test_faketensor") if backend == "triton" else ()
    check_ops(lambda: loss(**leaves).backward(), *tests)
    eager = torch.autograd.grad(loss(**leaves), leaves.values())
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(**leaves), leaves.values())
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))

    class Module(torch.nn.Module):
        def forward(self, **leaves):
            return loss(**leaves)

    constants = {name: leaf.detach() for name, leaf in leaves.items()}
    exported = torch.export.export(Module(), (), constants).module()
    assert torch.equal(exported(**constants), loss(**leaves))


@pytest.mark.parametrize("backend", usable(OP, "bias"))
def test_autocast_does_not_lower_the_loss(backend):
    problem = options()
    expected = sf.prototype_contrastive_loss(*problem[:3], temperature=0.05, bias=problem.bias, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sf.prototype_contrastive_loss(*problem[:3], temperature=0.05, bias=problem.bias, backend=backend)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", usable(OP, "bias"))
def test_same_bits_for_any_number_of_threads(backend):
    before, results = torch.get_num_threads(), []
    case = next(case for case in OPTIONS if case.name == "variances, bias and temperature")
    if backends.why_not(backend, asked(OP, *case.needs)):
        case = next(case for case in OPTIONS if case.name == "bias")
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run(sf.prototype_contrastive_loss, case, options((2, 48, 61, 67), 19), backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", usable(OP, "bias", among=ALL))
def test_a_class_masked_by_a_bias_of_minus_infinity_has_probability_0(backend):
    problem = options()
    labels = problem.labels.where(problem.labels != 4, 255)
    masked = torch.cat([torch.zeros(4), torch.tensor([-torch.inf])])
    got = sf.prototype_contrastive_loss(
        problem.features, labels, problem.prototypes, temperature=0.3, bias=masked, backend=backend
    )
    expected = sf.prototype_contrastive_loss(
        problem.features, labels, problem.prototypes[:4], temperature=0.3, backend="reference"
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", usable(OP, "prototype_class", among=ALL))
def test_of_rows_that_are_equal_the_lowest_has_the_gradient(backend):
    """Whole numbers, so that no backend can see a difference in their products."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-3, 4, (1, 8, 5, 7), generator=generator).float()
    twins = torch.randint(-2, 3, (5, 8), generator=generator).float().repeat(2, 1).requires_grad_()
    labels = torch.randint(0, 5, (1, 5, 7), generator=generator)
    loss = sf.prototype_contrastive_loss(
        features, labels, twins, temperature=4.0, normalize=False, prototype_class=torch.arange(5).repeat(2), pool="max", backend=backend
    )  # fmt: skip
    loss.backward()
    assert (twins.grad[5:] == 0).all() and (twins.grad[:5] != 0).any(1).all()


def test_a_temperature_that_is_a_parameter_of_a_model_learns():
    problem, scale = options(), torch.nn.Parameter(torch.tensor(1.0))
    optimizer, losses = torch.optim.SGD([scale], lr=0.1), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(sf.prototype_contrastive_loss(*problem[:3], temperature=scale))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and scale != 1.0


# ---------------------------------------------------------------------------------------------- what PyTorch has, too


@pytest.mark.parametrize("backend", usable(OP, "bias", "label_smoothing", "dbias"))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("soft", [False, True])
def test_a_linear_head_is_linear_cross_entropy(backend, reduction, smoothing, weighted, soft):
    problem = options((1, 16, 1, 40))
    rows = problem.features[0, :, 0].t()
    labels = problem.probabilities[0, :, 0].t() + 1e-3 if soft else problem.labels.flatten()
    labels = labels / labels.sum(1, keepdim=True) if soft else labels
    weight = problem.class_weight if weighted else None

    def run_each(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (rows, problem.prototypes, problem.bias)]
        target = labels.to(dtype) if soft else labels
        value = function(*leaves, target, None if weight is None else weight.to(dtype))
        return value.detach(), *torch.autograd.grad(
            value, leaves, torch.linspace(0.5, 2, value.numel()).view(value.shape).to(dtype)
        )

    common = {"reduction": reduction, "label_smoothing": smoothing} | ({} if soft else {"ignore_index": 255})

    def ours(x, p, b, y, w):
        named = backend if x.dtype == torch.float32 else None
        return sf.prototype_contrastive_loss(
            x, y, p, temperature=1, normalize=False, bias=b, class_weight=w, backend=named, **common
        )

    def cross_entropy(x, p, b, y, w):
        return F.cross_entropy(x @ p.T + b, y, weight=w, **common)

    truth, eager = run_each(cross_entropy, torch.float64), run_each(cross_entropy, torch.float32)
    for g, e, t in zip(run_each(ours, torch.float32), eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=8)
    for g, t in zip(run_each(ours, torch.float64), truth, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-13)
    if hasattr(F, "linear_cross_entropy"):
        theirs = run_each(
            lambda x, p, b, y, w: F.linear_cross_entropy(x, p, y, linear_bias=b, weight=w, **common), torch.float64
        )
        for g, t in zip(theirs, truth, strict=True):
            torch.testing.assert_close(g, t, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------------------- what is refused

_ROWS = {"prototypes": torch.ones(7, 16), "prototype_class": torch.tensor([0, 1, 2, 3, 4, 0, 4])}
_SOFT = {"labels": torch.ones(2, 5, 5, 7)}


@pytest.mark.parametrize(("change", "error", "text"), [
    (_SOFT | {"prototypes": torch.ones(5, 16), "prototype_class": torch.arange(5)}, ValueError,
     "probabilities as labels and prototype_class"),
    (_SOFT | {"margin": 0.2}, ValueError, "probabilities as labels and margin"),
    (_SOFT | {"positive_variance": False}, ValueError, "probabilities as labels and positive_variance=False"),
    (_SOFT | {"labels": torch.ones(2, 4, 5, 7)}, ValueError, r"must have shape \[2, 5, 5, 7\], got \[2, 4, 5, 7\]"),
    ({"labels": -torch.ones(2, 5, 5, 7)}, ValueError, r"probability -1.0 of class 0 at pixel \(image 0, row 0, column 0\)"),
    ({"labels": torch.ones(2, 5, 5, 7).fill_(torch.nan)}, ValueError, "probability nan of class 0"),
    ({"labels": torch.ones(2, 5, 5, 7).fill_(torch.inf)}, ValueError, "probability inf of class 0"),
    (_SOFT | {"labels": torch.ones(2, 5, 5, 7, requires_grad=True)}, ValueError, r"pass labels.detach\(\)"),
    ({"positive_variance": False, "label_smoothing": 0.1}, ValueError, "positive_variance=False and label_smoothing"),
    ({"positive_variance": False, "loss": "sigmoid"}, ValueError, "positive_variance=False and loss='sigmoid'"),
    (_ROWS | {"positive_variance": False}, ValueError, "positive_variance=False and prototype_class"),
    ({"denominator": "all", "reduction": "sum"}, ValueError, "denominator=all and reduction='sum'"),
    ({"denominator": torch.tensor(1.0), "reduction": "none"}, ValueError, "denominator=a tensor and reduction='none'"),
    ({"denominator": "pixels"}, ValueError, "denominator must be 'labelled' or 'all', got 'pixels'"),
    ({"denominator": torch.ones(2)}, ValueError, r"denominator must be a tensor of shape \[\]"),
    ({"pool": "max"}, ValueError, "pool='max' needs prototype_class"),
    ({"num_classes": 7}, ValueError, "num_classes=7 needs prototype_class"),
    (_ROWS | {"num_classes": 4}, ValueError, "num_classes=4, but prototype_class goes up to 4"),
    (_ROWS | {"prototype_class": torch.zeros(6, dtype=torch.long)}, ValueError, "one class for each of the 7 rows"),
    (_ROWS | {"prototype_class": torch.arange(7) - 1}, ValueError, "at least 0, got -1"),
    (_ROWS | {"pool": "mean"}, ValueError, "pool must be 'logsumexp' or 'max', got 'mean'"),
    ({"loss": "hinge"}, ValueError, "loss must be 'softmax' or 'sigmoid', got 'hinge'"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"margin": float("inf")}, ValueError, "margin must be finite"),
    ({"bias": torch.ones(4)}, ValueError, "bias must have one value for each of the 5 rows"),
    ({"bias": torch.ones(3, 5)}, ValueError, "bias must hold one set for each of 2 images"),
    ({"prototypes": torch.ones(3, 5, 16)}, ValueError, "prototypes must hold one set for each of 2 images"),
    ({"temperature": torch.ones(1)}, TypeError, r"a floating-point tensor of shape \[\]"),
    ({"temperature": torch.tensor(1)}, TypeError, "torch.int64"),
    ({"positive_variance": 1}, TypeError, "positive_variance must be True or False"),
    ({"features": torch.ones(6, 16), "labels": torch.zeros(6, dtype=torch.long), "prototypes": torch.ones(6, 5, 16)}, ValueError,
     r"features \[N, D\] cannot be used together"),
])  # fmt: skip
def test_what_means_nothing_is_refused_by_name(change, error, text):
    problem = options()
    given = {
        "features": problem.features,
        "labels": problem.labels,
        "prototypes": problem.prototypes,
        "temperature": 1.0,
    }
    with pytest.raises(error, match=text):
        sf.prototype_contrastive_loss(**given | change)


def test_a_backend_that_lacks_an_option_says_which_and_another_one_does_the_work():
    ask = asked(OP, "bias")._replace(dtype=torch.float64)
    assert backends.pick(ask, None) == "reference"
    with pytest.raises(RuntimeError, match="'cpu' was asked for and cannot be used: .*float64"):
        problem = options(dtype=torch.float64)
        sf.prototype_contrastive_loss(*problem[:3], temperature=1.0, bias=problem.bias, backend="cpu")
