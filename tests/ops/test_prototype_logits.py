"""prototype_logits on every backend that has it, against the formula; balance_ and TeacherTargets against the matrices never made."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from problems import ALL, OPTIONS, Option, check_ops, on_each_backend, options, usable

import spcl_fast as sf

OP = "prototype_logits"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
_NOT = (
    "class_weight",
    "pixel_weight",
    "labels",
    "reduction",
    "label_smoothing",
    "margin",
    "positive_variance",
    "denominator",
    "loss",
)
_OF_LOSSES = {"probabilities", "label_smoothing", "margin", "no_positive_variance", "denominator", "sigmoid"}
CASES = tuple(case for case in OPTIONS if not _OF_LOSSES & set(case.needs))


def run(function, case: Option, problem, leaf_dtype=None, **settings):
    given = {"features": problem.features, "prototypes": problem.prototypes, "temperature": 0.3}
    given |= {name: value for name, value in case.settings(problem).items() if name not in _NOT}
    leaves = {name: given.pop(name) for name in case.leaves}
    leaves = {
        name: leaf.detach().to(leaf_dtype or leaf.dtype).clone(memory_format=torch.preserve_format).requires_grad_()
        for name, leaf in leaves.items()
    }
    value = function(**leaves, **given, **settings)
    value = value.where(value.isfinite(), 0)
    incoming = torch.linspace(-1, 2, value.numel()).view(value.shape).to(value.dtype)
    value.backward(incoming)
    return value.detach(), *(leaf.grad for leaf in leaves.values())


def written_out(features, prototypes, **settings):
    return oracle.contrast_logits(features, prototypes, **settings).transpose(1, 2).unflatten(2, features.shape[2:])


@pytest.mark.parametrize(("backend", "case"), on_each_backend(OP, CASES))
@pytest.mark.parametrize("half", [False, True])
def test_values_and_every_gradient_follow_the_formula(backend, case, half):
    dtype = (torch.float16 if backend == "triton" else torch.bfloat16) if half else torch.float32
    problem = options(dtype=dtype)
    got = run(sf.prototype_logits, case, problem, backend=backend)
    eager = run(written_out, case, problem, dtype=dtype)
    truth = run(written_out, case, problem, torch.float64, dtype=torch.float64)
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=16 * max(1.0, torch.finfo(dtype).eps / torch.finfo(g.dtype).eps))


@pytest.mark.parametrize("backend", usable(OP, "bias", among=ALL))
def test_rows_sequences_and_volumes_have_their_own_layout(backend):
    problem = options((2, 16, 3, 4))
    common = {"temperature": 0.5, "bias": problem.bias, "backend": backend}
    image = sf.prototype_logits(problem.features, problem.prototypes, **common)
    rows = problem.features.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(
        sf.prototype_logits(rows, problem.prototypes, **common), image.permute(0, 2, 3, 1).flatten(0, 2)
    )
    torch.testing.assert_close(
        sf.prototype_logits(problem.features.flatten(2), problem.prototypes, **common), image.flatten(2)
    )
    volume = problem.features.unflatten(2, (1, 3))
    torch.testing.assert_close(sf.prototype_logits(volume, problem.prototypes, **common), image.unflatten(2, (1, 3)))


@pytest.mark.parametrize("backend", usable(OP, "bias", among=ALL))
def test_opcheck_compile_export_and_a_head_of_two_ops(backend):
    torch._dynamo.reset()
    problem = options((1, 16, 3, 5))
    labels = torch.randint(0, 5, (1, 12, 20))

    def head(features, prototypes, bias):
        logits = sf.prototype_logits(features, prototypes, temperature=1.0, normalize=False, bias=bias, backend=backend)
        return sf.upsampled_cross_entropy(logits, labels)

    leaves = [t.clone().requires_grad_() for t in (problem.features, problem.prototypes, problem.bias)]
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


def test_a_second_derivative_is_refused_with_a_reason():
    problem = options()
    features = problem.features.requires_grad_()
    logits = sf.prototype_logits(features, problem.prototypes, temperature=1.0)
    (grad,) = torch.autograd.grad(logits.sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="prototype_logits is differentiable once"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------- balance_ and TeacherTargets


def sinkhorn(scores, iterations):
    """[N, K] -> the assignment of SwAV, as its authors' code has it, in float64: rows sum to 1."""
    q = (scores - scores.max()).exp().T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * len(q)
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def head_problem(rows=37, classes=23, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    unit = lambda *size: F.normalize(torch.randn(size, generator=generator), dim=1)  # noqa: E731
    return [t.to(dtype) for t in (unit(rows, dim), unit(classes, dim), unit(rows, dim), unit(classes, dim))]


@pytest.mark.parametrize("backend", usable("balance_", among=ALL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("iterations", [1, 3])
def test_potentials_are_those_of_sinkhorn(backend, dtype, iterations):
    features, prototypes, *_ = head_problem(dtype=dtype)
    u, v = sf.balance_(features, prototypes, temperature=0.05, iterations=iterations, backend=backend)
    scores = features.double() @ prototypes.double().T / 0.05
    got = (scores + u[:, None] + v).exp()
    assert u.dtype == v.dtype == torch.float32
    torch.testing.assert_close(got, sinkhorn(scores, iterations), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.ones(37, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", usable("balance_", among=ALL))
def test_scores_beyond_a_half_floats_range_are_balanced(backend):
    features, prototypes, *_ = head_problem(dtype=torch.float16)
    u, v = sf.balance_(features * 30, prototypes * 30, temperature=0.01, backend=backend)
    assert u.isfinite().all() and v.isfinite().all()


@pytest.mark.parametrize("backend", usable("prototype_contrastive_loss", "teacher", among=ALL))
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("layout", ["rows", "image"])
def test_a_teachers_targets_are_the_probabilities_that_they_stand_for(backend, balanced, layout):
    teacher, of_teacher, student, of_student = head_problem(rows=36)
    u, v = sf.balance_(teacher, of_teacher, temperature=0.07) if balanced else (None, None)
    scores = teacher.double() @ of_teacher.double().T / 0.07
    target = (scores + u.double()[:, None] + v).exp() if balanced else scores.softmax(1)

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (student, of_student)]
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    def ours(x, p):
        features, of = (
            (x, teacher)
            if layout == "rows"
            else (x.view(2, 18, 8).mT.unflatten(2, (3, 6)), teacher.view(2, 18, 8).mT.unflatten(2, (3, 6)))
        )
        targets = sf.TeacherTargets(of, of_teacher, 0.07, u, v)
        return sf.prototype_contrastive_loss(features, targets, p, temperature=0.1, backend=backend)

    def written(x, p):
        z = F.normalize(x, dim=1) @ p.T / 0.1
        return -(target.to(x.dtype) * z.log_softmax(1)).sum(1).mean()

    for g, e, t in zip(run(ours, torch.float32), run(written, torch.float32), run(written, torch.float64), strict=True):
        oracle.assert_as_accurate(g, e, t, slack=32)


@pytest.mark.parametrize(("change", "text"), [
    ({"margin": 0.1}, "TeacherTargets and margin"),
    ({"prototypes": torch.ones(5, 8)}, "the teacher must have the 5 classes"),
    ({"features": torch.ones(12, 8)}, "the teacher's features must have the features' grid"),
])  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused_by_name(change, text):
    teacher, of_teacher, student, of_student = head_problem()
    given = {
        "features": student,
        "labels": sf.TeacherTargets(teacher, of_teacher, 0.1),
        "prototypes": of_student,
        "temperature": 0.1,
    }
    with pytest.raises(ValueError, match=text):
        sf.prototype_contrastive_loss(**given | change)
    with pytest.raises(ValueError, match="targets are constants"):
        sf.prototype_contrastive_loss(
            student, sf.TeacherTargets(teacher.requires_grad_(), of_teacher, 0.1), of_student, temperature=0.1
        )


def test_balance_refuses_what_does_not_fit():
    features, prototypes, *_ = head_problem()
    for arguments, settings, text in (
        ((features, prototypes[:, :3]), {}, "with the features' E"),
        ((features, prototypes), {"iterations": 0}, "iterations must be an int of at least 1"),
        ((features, prototypes), {"temperature": math.inf}, "finite and above 0"),
    ):
        with pytest.raises(ValueError, match=text):
            sf.balance_(*arguments, **{"temperature": 0.1} | settings)
