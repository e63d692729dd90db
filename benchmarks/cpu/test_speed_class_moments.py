"""class_moments on the CPU next to the released update and a one-hot product. Floor: 1 S, the features read once."""

from __future__ import annotations

import pytest
import torch

import spcl_fast as sf
from benchmarks.cpu.figures import Problem, floors_ms, set_floor
from benchmarks.peers import formulas

OP = "class_moments"
ROUNDS = {"spcl_fast": 25, "one-hot product": 6, "released update": 4}


def ours(features, labels, num_classes):
    return sf.class_moments(features, labels, num_classes, backend="cpu").sums


def released(features, labels, num_classes):
    return formulas.released_prototypes(features, labels, num_classes).t()  # means, not sums


FUNCTIONS = {"spcl_fast": ours, "one-hot product": formulas.one_hot_sums, "released update": released}


def refuse_a_wrong_answer(function, peer: str, problem: Problem) -> None:
    x, labels = problem.features.detach().flatten(2), problem.labels.flatten(1).long()
    sums, counts = (
        torch.zeros(problem.num_classes, x.shape[1], dtype=torch.float64),
        torch.zeros(problem.num_classes, dtype=torch.float64),
    )
    for image, target in zip(x, labels, strict=True):
        unit = (image.double() / image.double().norm(dim=0))[:, target != 255]
        sums.index_add_(0, target[target != 255], unit.t())
        counts += torch.bincount(target[target != 255], minlength=problem.num_classes)
    expected = sums / counts.clamp_min(1)[:, None] if peer == "released update" else sums
    got = function(problem.features.detach(), problem.labels, problem.num_classes)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("peer", FUNCTIONS)
def test_class_sums(peer, problem, figure):
    function = FUNCTIONS[peer]
    refuse_a_wrong_answer(function, peer, problem)
    features = problem.features.detach()
    figure(OP, problem, peer, lambda: function(features, problem.labels, problem.num_classes), ROUNDS[peer])
    if peer == "spcl_fast":
        set_floor(OP, problem, 0.5 * floors_ms(problem.name)["copy"], "1 S at the measured copy rate")
