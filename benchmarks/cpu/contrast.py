"""prototype_contrastive_loss, forward + backward.

Floor: the larger of 3 S of traffic (S read twice, S written; S = bytes of the features) and the two matrix products by torch.mm.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import spcl_fast as sf
from benchmarks import shapes
from benchmarks.cpu.case import OURS, Case, Floor, Function
from benchmarks.cpu.floors import Problem, floors_ms, make_problem
from benchmarks.peers import formulas

OP = "prototype_contrastive_loss"
TEMPERATURE = 0.1


def ours(features: Tensor, labels: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    return sf.prototype_contrastive_loss(features, labels, prototypes, temperature=temperature, backend="cpu")


@functools.lru_cache(maxsize=1)
def truth(name: str) -> tuple[Tensor, Tensor]:
    """The loss and its gradient at 500 pixels of each image, in float64, by the formula."""
    problem = make_problem(name)
    x = problem.features.detach().flatten(2)
    labels = problem.labels.flatten(1).long()
    logits = torch.stack([problem.prototypes.double() @ (i.double() / i.double().norm(dim=0)) for i in x]) / TEMPERATURE
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255)
    labelled = (labels != 255).sum()
    pixels = torch.arange(0, x.shape[2], max(1, x.shape[2] // 500))
    weight = logits[:, :, pixels].softmax(1)
    one_hot = torch.nn.functional.one_hot(labels[:, pixels].where(labels[:, pixels] != 255, 0), problem.num_classes)
    weight = (weight - one_hot.transpose(1, 2)) * (labels[:, None, pixels] != 255) / labelled
    some = x[:, :, pixels].double()
    norm = some.norm(dim=1, keepdim=True)
    dunit = problem.prototypes.double().t() @ weight / TEMPERATURE
    unit = some / norm
    return loss, (dunit - (dunit * unit).sum(1, keepdim=True) * unit) / norm


def step(function: Function, problem: Problem) -> Tensor:
    """Forward and backward; the gradient is dropped first and made anew. -> loss"""
    problem.features.grad = None
    loss = function(problem.features, problem.labels, problem.prototypes, TEMPERATURE)
    loss.backward()
    return loss


def check(problem: Problem, function: Function) -> None:
    loss = step(function, problem)
    expected, gradient = truth(problem.name)
    pixels = problem.features[0, 0].numel()
    assert problem.features.grad is not None
    got = problem.features.grad.flatten(2)[:, :, torch.arange(0, pixels, max(1, pixels // 500))]
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    problem.features.grad = None


def floor(name: str) -> Floor:
    measured = floors_ms(name)
    traffic, products = 1.5 * measured["copy"], measured["products"]
    words = f"max(3 S at the measured copy rate {traffic:.2f} ms, the two products by torch.mm {products:.2f} ms)"
    return Floor(max(traffic, products), words)


def case(name: str) -> Case:
    problem = make_problem(name)
    peers, missing = formulas.contrast_peers()
    peers = {OURS: ours, "channel_first compiled": formulas.channel_first_contrast} | peers
    if "linear_cross_entropy" in peers:
        peers["linear_cross_entropy compiled"] = formulas.linear_cross_entropy
    return Case(
        OP, name, problem.sizes, peers, missing,
        refuse_a_wrong_answer=lambda peer, function: check(problem, function),
        call=lambda function: lambda: step(function, problem),
        floor=lambda: floor(name),
    )  # fmt: skip


NAMES = shapes.CPU
