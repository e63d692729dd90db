"""upsampled_prediction on the CPU next to its peers. Floor: one torch.exp over a map as large as the up-sampled logits."""

from __future__ import annotations

import pytest
import torch

import spcl_fast as sf
from benchmarks.cpu.figures import UpsampledProblem, exp_ms, set_floor
from benchmarks.peers import formulas

OP = "upsampled_prediction"
ROUNDS = {"spcl_fast": 25, "interpolate compiled": 9, "interpolate": 5}


def ours(logits, size):
    return sf.upsampled_prediction(logits, size, backend="cpu")


FUNCTIONS = {
    "spcl_fast": ours,
    "interpolate compiled": formulas.interpolate_prediction,
    "interpolate": formulas.interpolate_prediction,
}


def refuse_a_wrong_answer(function, problem: UpsampledProblem) -> None:
    logits, size = problem.logits.detach(), problem.labels.shape[1:]
    labels, confidence = function(logits, size)
    for image in range(len(logits)):
        up = torch.nn.functional.interpolate(
            logits[image : image + 1].double(), size, mode="bilinear", align_corners=True
        )[0]
        top = up.softmax(0).topk(2, 0)
        torch.testing.assert_close(
            confidence[image].double(), top.values[0], rtol=1e-4, atol=1e-5
        )  # eager computes positions in float32
        clear = top.values[0] - top.values[1] > 1e-4
        assert torch.equal(labels[image].long()[clear], top.indices[0][clear])


@pytest.mark.parametrize("peer", FUNCTIONS)
def test_prediction(peer, upsampled_problem, figure):
    problem, function = upsampled_problem, FUNCTIONS[peer]
    if peer.endswith("compiled"):
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False)
    refuse_a_wrong_answer(function, problem)
    logits, size = problem.logits.detach(), problem.labels.shape[1:]
    figure(OP, problem, peer, lambda: function(logits, size), ROUNDS[peer])
    if peer == "spcl_fast":
        set_floor(OP, problem, exp_ms(problem.name), "one torch.exp over the up-sampled logits")
