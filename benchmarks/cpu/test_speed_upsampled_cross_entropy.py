"""upsampled_cross_entropy, forward + backward, on the CPU next to its peers.

Floor: one torch.exp over a map as large as the up-sampled logits; a softmax needs that many.
"""

from __future__ import annotations

import functools

import pytest
import torch

import spcl_fast as sf
from benchmarks.cpu.figures import UpsampledProblem, exp_ms, make_upsampled_problem, set_floor
from benchmarks.peers import formulas

OP = "upsampled_cross_entropy"
TEMPERATURE = 1.8
ROUNDS = {"spcl_fast": 25, "interpolate compiled": 9, "interpolate": 5, "interpolate channels_last": 5}


def ours(logits, labels, temperature):
    return sf.upsampled_cross_entropy(logits, labels, temperature=temperature, backend="cpu")


def channels_last(logits, labels, temperature):
    return formulas.interpolate_cross_entropy(logits.contiguous(memory_format=torch.channels_last), labels, temperature)


FUNCTIONS = {
    "spcl_fast": ours,
    "interpolate compiled": formulas.interpolate_cross_entropy,
    "interpolate": formulas.interpolate_cross_entropy,
    "interpolate channels_last": channels_last,
}


def value_and_gradient(function, logits, labels) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.detach().requires_grad_()
    loss = function(logits, labels, TEMPERATURE)
    loss.backward()
    return loss.detach().double(), logits.grad.double()


@functools.lru_cache(maxsize=1)
def truth(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, by the formula."""
    problem = make_upsampled_problem(name)
    logits = problem.logits.detach().double().requires_grad_()
    up = (
        torch.nn.functional.interpolate(logits, problem.labels.shape[1:], mode="bilinear", align_corners=True)
        / TEMPERATURE
    )
    loss = torch.nn.functional.cross_entropy(up, problem.labels.long(), ignore_index=255)
    loss.backward()
    return loss.detach(), logits.grad


def refuse_a_wrong_answer(function, problem: UpsampledProblem) -> None:
    (loss, gradient), (expected, slope) = (
        value_and_gradient(function, problem.logits, problem.labels),
        truth(problem.name),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-5 * slope.abs().max().item())


@pytest.mark.parametrize("peer", FUNCTIONS)
def test_forward_and_backward(peer, upsampled_problem, figure):
    problem, function = upsampled_problem, FUNCTIONS[peer]
    if peer.endswith("compiled"):
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False)
    refuse_a_wrong_answer(function, problem)

    def step():
        problem.logits.grad = None
        function(problem.logits, problem.labels, TEMPERATURE).backward()

    figure(OP, problem, peer, step, ROUNDS[peer])
    if peer == "spcl_fast":
        set_floor(OP, problem, exp_ms(problem.name), "one torch.exp over the up-sampled logits")
