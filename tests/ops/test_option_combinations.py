"""Every pair of options of prototype_contrastive_loss, and every triple of those that change a formula: run, not refused, and right.

A few dozen problems hold them all: each is chosen to hold the most triples that no problem before it held.
"""

from __future__ import annotations

import functools
import itertools
import random

import oracle
import pytest
import torch
from on_backends import asked, usable
from problems import problem

import spcl_fast as sf
from spcl_fast import backends
from spcl_fast.backends import cuda, measured
from spcl_fast.backends.contract import NEEDS

OP = "prototype_contrastive_loss"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter

FORMULA = {  # options that change the formula: all triples
    "labels": ("classes", "probabilities", "teacher", "teacher with potentials"),
    "prototypes": ("shared", "per image"),
    "rows": ("one a class", "logsumexp", "max"),
    "variances": ("none", "everywhere", "not of the label"),
    "bias": ("none", "shared", "per image"),
    "temperature": ("number", "tensor"),
    "label_smoothing": (0.0, 0.1),
    "margin": (0.0, 0.2),
    "loss": ("softmax", "sigmoid"),
}
AROUND = {  # what is done with a pixel's loss: all pairs
    "weights": ("none", "class and pixel"),
    "denominator": ("labelled", "all", "tensor"),
    "reduction": ("mean", "sum", "none"),
    "normalize": (True, False),
    "dim": (16, 32),  # of 5 or 7 rows: logits computed again, and saved
}
FACTORS = FORMULA | AROUND
# pairs that mean nothing; the words with which each is refused
REFUSED = {
    frozenset({("labels", soft), option}): f"{words} and {name}"
    for soft, words in (("probabilities", "probabilities as labels"), ("teacher", "TeacherTargets"),
                        ("teacher with potentials", "TeacherTargets"))
    for option, name in ((("rows", "logsumexp"), "prototype_class"), (("rows", "max"), "prototype_class"), (("margin", 0.2), "margin"),
                         (("variances", "not of the label"), "positive_variance=False"))
} | {
    frozenset({("variances", "not of the label"), option}): f"positive_variance=False and {name}"
    for option, name in ((("label_smoothing", 0.1), "label_smoothing"), (("loss", "sigmoid"), "loss='sigmoid'"),
                         (("rows", "logsumexp"), "prototype_class"), (("rows", "max"), "prototype_class"))
} | {
    frozenset({("denominator", denominator), ("reduction", reduction)}): f"reduction='{reduction}'"
    for denominator in ("all", "tensor") for reduction in ("sum", "none")
}  # fmt: skip


def is_refused(choices: tuple) -> bool:
    return any(frozenset(pair) in REFUSED for pair in itertools.combinations(choices, 2))


def wanted_combinations() -> set[tuple]:
    names = list(FACTORS)
    groups = [*itertools.combinations(FORMULA, 3), *itertools.combinations(names, 2)]
    every = (tuple(zip(group, values, strict=True)) for group in groups
             for values in itertools.product(*(FACTORS[name] for name in group)))  # fmt: skip
    return {choices for choices in every if not is_refused(choices)}


def held_by(problem: dict) -> set[tuple]:
    choices = tuple(problem.items())
    formula = choices[: len(FORMULA)]
    return {*itertools.combinations(formula, 3), *itertools.combinations(choices, 2)}


@functools.cache
def problems_of_all() -> list[dict]:
    draw, missing, chosen = random.Random(0), wanted_combinations(), []
    while missing:
        seed = draw.choice(sorted(missing, key=repr)) if len(missing) < 200 else ()
        candidates = [drawn(draw, seed) for _ in range(20)]
        best = max(candidates, key=lambda problem: len(held_by(problem) & missing))
        missing -= held_by(best)
        chosen.append(best)
    return chosen


def drawn(draw: random.Random, seed: tuple) -> dict:
    """A random problem that holds `seed` and nothing that is refused."""
    given = dict(seed)
    for name in draw.sample(list(FACTORS), len(FACTORS)):
        if name not in given:
            fitting = [value for value in FACTORS[name] if not is_refused((*given.items(), (name, value)))]
            given[name] = draw.choice(fitting)
    return {name: given[name] for name in FACTORS}


def arguments(given: dict) -> tuple[dict, dict]:
    """What is differentiated, and everything else."""
    o = problem((2, given["dim"], 2, 3), temperature=0.4, seed=1)
    generator = torch.Generator().manual_seed(1)
    images = (2,) if given["prototypes"] == "per image" else ()
    pooled = given["rows"] != "one a class"
    rows = len(o.rows) if pooled else len(o.prototypes)
    prototypes = torch.nn.functional.normalize(torch.randn(*images, rows, given["dim"], generator=generator), dim=-1)
    leaves = {"features": o.features, "prototypes": prototypes}
    if given["bias"] != "none":
        leaves["bias"] = torch.randn(*((2,) if given["bias"] == "per image" else ()), rows, generator=generator)
    rest = {"labels": o.labels, "temperature": 0.4}
    if given["temperature"] == "tensor":
        leaves["temperature"] = rest.pop("temperature") * torch.ones(())
    if given["labels"] == "probabilities":
        rest["labels"] = o.probabilities
    if given["labels"].startswith("teacher"):
        teacher = torch.randn(2, 6, 2, 3, generator=generator), torch.randn(len(o.prototypes), 6, generator=generator)
        potentials = (
            torch.randn(2, 2, 3, generator=generator) - 3,
            torch.randn(len(o.prototypes), generator=generator),
        )
        rest["labels"] = sf.TeacherTargets(*teacher, 0.7, *(potentials if "with" in given["labels"] else ()))
    if pooled:
        rest |= {"prototype_class": o.row_class, "pool": given["rows"]}
    if given["variances"] != "none":
        rest["variances"] = 0.2 * torch.rand(prototypes.shape, generator=generator)
        rest["positive_variance"] = given["variances"] == "everywhere"
    if given["weights"] != "none":
        rest |= {"class_weight": o.class_weight, "pixel_weight": o.pixel_weight}
    rest["denominator"] = torch.tensor(4.5) if given["denominator"] == "tensor" else given["denominator"]
    return leaves, rest | {
        name: given[name] for name in ("label_smoothing", "margin", "loss", "reduction", "normalize")
    }


def differentiated(function, leaves: dict, rest: dict, dtype: torch.dtype = torch.float32) -> list:
    leaves = {name: leaf.to(dtype).clone().requires_grad_() for name, leaf in leaves.items()}
    value = function(**leaves, **rest)
    incoming = torch.linspace(0.5, 2, value.numel()).view(value.shape).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves.values(), incoming)]


def as_probabilities(labels, dtype: torch.dtype):
    """A teacher's targets, stored."""
    if not isinstance(labels, sf.TeacherTargets):
        return labels
    features, prototypes, temperature, u, v = labels
    scores = torch.einsum("beij,ke->bkij", features.to(dtype), prototypes.to(dtype)) / temperature
    if v is not None:
        scores = scores + v.to(dtype)[:, None, None]
    return scores.softmax(1) if u is None else (scores + u.to(dtype)[:, None]).exp()


def of_formula(leaves: dict, rest: dict, dtype: torch.dtype) -> list:
    rest = rest | {"labels": as_probabilities(rest["labels"], dtype)}
    return differentiated(functools.partial(oracle.contrast, dtype=dtype), leaves, rest, dtype)


@pytest.mark.parametrize("backend", usable(OP, among=("cpu", "triton")))
@pytest.mark.parametrize(
    "given", problems_of_all(), ids=lambda given: "-".join(map(str, given.values())).replace(" ", "_")
)
def test_value_and_every_gradient_follow_the_formula(backend, given):
    leaves, rest = arguments(given)
    got = differentiated(lambda **kw: sf.prototype_contrastive_loss(**kw, backend=backend), leaves, rest)
    eager, truth = (of_formula(leaves, rest, dtype) for dtype in (torch.float32, torch.float64))
    for name, g, e, t in zip(("loss", *leaves), got, eager, truth, strict=True):
        try:  # the temperature's is one sum whose terms nearly cancel
            oracle.assert_as_accurate(g, e, t, slack=64 if name == "temperature" else 16)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("pair", sorted(map(sorted, REFUSED), key=repr), ids=repr)
def test_what_is_left_out_is_refused_by_name(pair):
    given = {name: values[0] for name, values in FACTORS.items()} | dict(pair)
    leaves, rest = arguments(given)
    with pytest.raises(ValueError, match=REFUSED[frozenset(map(tuple, pair))]):
        sf.prototype_contrastive_loss(**leaves, **rest, backend="reference")


@pytest.mark.parametrize("backend", ["reference", *usable(OP, among=("cpu", "triton"))])
def test_no_set_of_options_is_refused_by_a_backend(backend):
    """Whatever is asked for at once: an op refuses what means nothing before a backend is asked."""
    of_the_op = [need for need in NEEDS if need not in ("pixel_weight", "focal", "int32_labels")]
    assert backends.why_not(backend, asked(OP, *of_the_op)) is None
    for pair in itertools.combinations(of_the_op, 2):
        assert backends.why_not(backend, asked(OP, *pair)) is None


NOT_IN_CUDA = (
    ("prototype_logits", ""), ("upsampled_binary_cross_entropy", ""), ("balance_", ""), ("upsampled_cross_entropy", "label_smoothing"),
    ("upsampled_cross_entropy", "probabilities"), (OP, "teacher"), (OP, "prototype_class"),
)  # fmt: skip


@pytest.mark.parametrize(("op", "need"), NOT_IN_CUDA)
def test_what_cuda_lacks_falls_to_triton_and_is_refused_with_the_reason_where_cuda_is_named(op, need, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(measured, "order", lambda ask: ("cuda", "triton"))
    monkeypatch.delenv("SPCL_FAST_BACKEND", raising=False)
    ask = asked(op, *filter(None, [need]), device="cuda")
    assert backends.pick(ask, None) == "triton"
    assert backends.pick(asked("upsampled_confusion", device="cuda"), None) == "cuda"
    with pytest.raises(RuntimeError, match=rf"no {f'`{need}`' if need else op}.*use backend='triton'"):
        backends.pick(ask, "cuda")
