"""balance_ and TeacherTargets on every backend that has them, against the matrices that are never made."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from on_backends import ALL, call, dtypes, run, usable
from problems import CONTRAST

import spcl_fast as sf
from spcl_fast import backends
from spcl_fast.backends.contract import Balance

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EVERY = usable("balance_", among=ALL)


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


@pytest.mark.parametrize(("rows", "classes"), [(37, 23), (40, 70), (5, 3)])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("backend", EVERY)
def test_potentials_are_those_of_sinkhorn_and_rows_sum_to_1(backend, iterations, rows, classes):
    for dtype in dtypes(backend)[:2]:
        features, prototypes, *_ = head_problem(rows, classes, dtype=dtype)
        given = {"features": features, "prototypes": prototypes, "temperature": 0.05, "iterations": iterations}
        u, v = call(sf.balance_, backend, **given)
        scores = features.double() @ prototypes.double().T / 0.05
        got = (scores + u[:, None] + v).exp()
        assert u.dtype == v.dtype == torch.float32
        torch.testing.assert_close(got, sinkhorn(scores, iterations), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.sum(1), torch.ones(rows, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("sizes", [(7, 3), (300, 70), (65, 500)])
def test_a_half_step_of_sinkhorn_is_the_logsumexp_of_all_scores(backend, sizes):
    n, k = sizes if backend != "triton" else (min(sizes[0], 65), min(sizes[1], 70))  # its interpreter is slow
    for dtype in dtypes(backend):
        features, prototypes, *_ = head_problem(n, k, 40, dtype)
        generator = torch.Generator().manual_seed(1)
        u, v = torch.randn(n, generator=generator), torch.randn(k, generator=generator)
        scores = features.double() @ prototypes.double().T / 0.05

        def half_steps(features, prototypes, u, v):
            step = backends.module(backend)
            asked = Balance(features, prototypes, 0.05)
            return step.balance_rows(asked, v), step.balance_columns(asked, u)

        rows, columns = call(half_steps, features=features, prototypes=prototypes, u=u, v=v)
        assert rows.dtype == columns.dtype == torch.float32
        assert torch.allclose(rows.double(), (scores + v).logsumexp(1), rtol=2e-6, atol=2e-5)
        assert torch.allclose(columns.double(), (scores + u[:, None]).logsumexp(0), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtypes_of", ["half features", "half prototypes"])
def test_half_floats_next_to_float32_cost_the_potentials_no_digits(backend, dtypes_of):
    """Rounding the others to half floats, too, would be seen 20 times enlarged, in every potential."""
    half = dtypes(backend)[1]
    features, prototypes, *_ = head_problem(45, 34)
    given = [features.to(half), prototypes] if dtypes_of == "half features" else [features, prototypes.to(half)]

    def potentials(features, prototypes):
        return sf.balance_(features, prototypes, temperature=0.05, backend="reference")

    got = call(sf.balance_, backend, features=given[0], prototypes=given[1], temperature=0.05)
    eager, truth = (potentials(*(t.to(dtype) for t in given)) for dtype in (torch.float32, torch.float64))
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("shared", [False, True], ids=["even", "class_share"])
def test_of_no_rows_at_all_every_potential_is_0(backend, shared):
    given = {"features": torch.empty(0, 8), "prototypes": torch.randn(3, 8), "temperature": 0.1}
    if shared:
        given["class_share"] = torch.tensor([0.5, 0.5, 0.0])
    u, v = call(sf.balance_, backend, **given)
    assert u.shape == (0,) and torch.equal(v, torch.zeros(3))


@pytest.mark.parametrize("backend", EVERY)
def test_scores_beyond_a_half_floats_range_are_balanced(backend):
    features, prototypes, *_ = head_problem(dtype=torch.float16)
    u, v = call(sf.balance_, backend, features=features * 30, prototypes=prototypes * 30, temperature=0.01)
    assert u.isfinite().all() and v.isfinite().all()


@pytest.mark.parametrize("backend", usable(CONTRAST, "teacher", among=ALL))
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("layout", ["rows", "image"])
def test_a_teachers_targets_are_the_probabilities_that_they_stand_for(backend, balanced, layout):
    teacher, of_teacher, student, of_student = head_problem(rows=36)
    u, v = sf.balance_(teacher, of_teacher, temperature=0.07) if balanced else (None, None)
    scores = teacher.double() @ of_teacher.double().T / 0.07
    target = (scores + u.double()[:, None] + v).exp() if balanced else scores.softmax(1)

    def as_images(rows):
        return rows if layout == "rows" else rows.view(2, 18, -1).mT.unflatten(2, (3, 6))

    def ours(x, p, targets, backend):
        return sf.prototype_contrastive_loss(as_images(x), targets, p, temperature=0.1, backend=backend)

    def written(x, p):
        z = F.normalize(x, dim=1) @ p.T / 0.1
        return -(target.to(x.dtype) * z.log_softmax(1)).sum(1).mean()

    given = {"x": student, "p": of_student}
    targets = sf.TeacherTargets(as_images(teacher), of_teacher, 0.07, u, v)
    got = run(ours, given | {"targets": targets}, ("x", "p"), backend)
    eager, truth = (run(written, given, ("x", "p"), leaf_dtype=dtype) for dtype in (torch.float32, torch.float64))
    for g, e, t in zip(got, eager, truth, strict=True):
        oracle.assert_as_accurate(g, e, t, slack=32)


@pytest.mark.parametrize("backend", usable(CONTRAST, "teacher", among=ALL))
def test_a_teachers_half_features_next_to_float32_prototypes_cost_its_targets_no_digits(backend):
    """At a temperature of 0.01 scores are near 100: prototypes in half floats would change each target by a tenth."""
    teacher, of_teacher, student, of_student = head_problem(rows=36)
    teacher = teacher.to(dtypes(backend)[1])
    got = call(
        sf.prototype_contrastive_loss, backend, features=student, prototypes=of_student, temperature=0.1, reduction="none",
        labels=sf.TeacherTargets(teacher, of_teacher, 0.01),
    )  # fmt: skip
    eager, truth = (
        -((teacher.to(dtype) @ of_teacher.to(dtype).T / 0.01).softmax(1)
          * (F.normalize(student.to(dtype), dim=1) @ of_student.to(dtype).T / 0.1).log_softmax(1)).sum(1)
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    oracle.assert_as_accurate(got, eager, truth, slack=16)


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
