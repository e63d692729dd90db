"""TeacherTargets where numbers are large: the targets of unnormalised features, and their sum."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from on_backends import usable

import spcl_fast as sf

OP = "prototype_contrastive_loss"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter


def of_scale(scale: float, seed: int) -> tuple[torch.Tensor, ...]:
    """Student and its prototypes, teacher and its: N 70, D 48, K 130."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((70, 48), (130, 48), (70, 24), (130, 24))
    features, prototypes, teacher, of_teacher = (torch.randn(size, generator=generator) for size in sizes)
    return scale * features, prototypes, scale * teacher, of_teacher


def eager(features, prototypes, teacher, of_teacher, loss: str) -> torch.Tensor:
    targets, z = (teacher @ of_teacher.T / 0.5).softmax(1), features @ prototypes.T / 0.5
    if loss == "softmax":
        return F.cross_entropy(z, targets)
    return F.binary_cross_entropy_with_logits(z, targets, reduction="none").sum(1).mean()


def ours(features, prototypes, teacher, of_teacher, loss: str, backend: str) -> torch.Tensor:
    targets = sf.TeacherTargets(teacher, of_teacher, 0.5)
    return sf.prototype_contrastive_loss(
        features, targets, prototypes, temperature=0.5, normalize=False, loss=loss, backend=backend
    )


def differentiated(function, tensors, dtype: torch.dtype, *settings) -> list[torch.Tensor]:
    tensors = [tensor.to(dtype) for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in tensors[:2]]
    value = function(*tensors, *settings)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("backend", usable(OP, "teacher", among=("reference", "cpu", "triton")))
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_unnormalised_features_cost_a_teacher_s_targets_no_digits(backend, loss, scale):
    """One error is luck: the root of the mean square over ten draws is compared (three in Triton's interpreter, which takes seconds)."""
    errors = torch.zeros(3, 2, dtype=torch.float64)
    sizes = torch.zeros(3, dtype=torch.float64)
    for seed in range(3 if backend == "triton" else 10):
        tensors = of_scale(scale, seed)
        truth = differentiated(eager, tensors, torch.float64, loss)
        both = (
            differentiated(ours, tensors, torch.float32, loss, backend),
            differentiated(eager, tensors, torch.float32, loss),
        )
        for part, t in enumerate(truth):
            sizes[part] = max(sizes[part], t.abs().max())
            for which, found in enumerate(both):
                errors[part, which] += (found[part].double() - t).square().mean()
    got, allowed = errors.sqrt().unbind(1)
    assert (got <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * sizes).all(), f"{got} against {allowed} of eager"


@pytest.mark.parametrize("backend", usable(OP, "teacher", among=("reference", "cpu", "triton")))
def test_rows_that_are_to_sum_to_1_do_so_whatever_the_scale(backend):
    """Where all student logits are equal the loss is the targets' sum times log K."""
    features, prototypes, teacher, of_teacher = of_scale(300.0, 0)
    targets = sf.TeacherTargets(teacher, of_teacher, 0.05, v=torch.linspace(-3, 3, 130))
    loss = sf.prototype_contrastive_loss(
        features, targets, torch.zeros_like(prototypes), temperature=1.0, reduction="none", backend=backend
    )
    torch.testing.assert_close(loss, torch.full((70,), 130.0).log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", usable(OP, "teacher", among=("reference", "cpu", "triton")))
def test_potentials_of_balance_are_taken_as_they_are(backend):
    features, prototypes, teacher, of_teacher = of_scale(1.0, 0)
    u, v = sf.balance_(teacher, of_teacher, temperature=0.5)
    t = (teacher.double() @ of_teacher.double().T / 0.5 + u[:, None] + v).exp()
    truth = F.cross_entropy(features.double() @ prototypes.double().T / 0.5, t)
    got = sf.prototype_contrastive_loss(
        features, sf.TeacherTargets(teacher, of_teacher, 0.5, u, v), prototypes, temperature=0.5, normalize=False, backend=backend
    )  # fmt: skip
    oracle.assert_as_accurate(got, truth.float(), truth, slack=16)


@pytest.mark.parametrize("backend", [None, *usable(OP, "teacher", among=("reference", "cpu", "cuda"))])
def test_a_teacher_without_potentials_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    features, prototypes, teacher, of_teacher = of_scale(1.0, 0)

    def loss(features):
        targets = sf.TeacherTargets(teacher, of_teacher, 0.5)
        return sf.prototype_contrastive_loss(features, targets, prototypes, temperature=0.5, backend=backend)

    assert torch.equal(torch.compile(loss, fullgraph=True, backend="aot_eager")(features), loss(features))
