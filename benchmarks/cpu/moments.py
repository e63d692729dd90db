"""class_moments next to the released update and a one-hot product. Floor: 1 S, the features read once."""

from __future__ import annotations

import torch
from torch import Tensor

import spcl_fast as sf
from benchmarks import shapes
from benchmarks.cpu.case import OURS, Case, Floor, Function
from benchmarks.cpu.floors import Problem, floors_ms, make_problem
from benchmarks.peers import formulas

OP = "class_moments"
_RELEASED = "released update"


def ours(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return sf.class_moments(features, labels, num_classes, backend="cpu").sums


def released(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return formulas.released_prototypes(features, labels, num_classes).t()  # means, not sums


def check(problem: Problem, peer: str, function: Function) -> None:
    x, labels = problem.features.detach().flatten(2), problem.labels.flatten(1).long()
    sums = torch.zeros(problem.num_classes, x.shape[1], dtype=torch.float64)
    counts = torch.zeros(problem.num_classes, dtype=torch.float64)
    for image, target in zip(x, labels, strict=True):
        unit = (image.double() / image.double().norm(dim=0))[:, target != 255]
        sums.index_add_(0, target[target != 255], unit.t())
        counts += torch.bincount(target[target != 255], minlength=problem.num_classes)
    expected = sums / counts.clamp_min(1)[:, None] if peer == _RELEASED else sums
    got = function(problem.features.detach(), problem.labels, problem.num_classes)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def case(name: str) -> Case:
    problem = make_problem(name)
    features = problem.features.detach()
    peers = {OURS: ours, "one-hot product": formulas.one_hot_sums, _RELEASED: released}
    return Case(
        OP, name, problem.sizes, peers, {},
        refuse_a_wrong_answer=lambda peer, function: check(problem, peer, function),
        call=lambda function: lambda: function(features, problem.labels, problem.num_classes),
        floor=lambda: Floor(0.5 * floors_ms(name)["copy"], "1 S at the measured copy rate"),
    )  # fmt: skip


NAMES = shapes.CPU
