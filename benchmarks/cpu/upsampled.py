"""upsampled_cross_entropy, forward + backward, and upsampled_prediction.

Floor of both: one torch.exp over a map as large as the up-sampled logits; a softmax needs that many.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import spcl_fast as sf
from benchmarks import shapes
from benchmarks.cpu.case import OURS, Case, Floor, Function
from benchmarks.cpu.floors import UpsampledProblem, exp_ms, make_upsampled_problem
from benchmarks.peers import formulas

TEMPERATURE = 1.8


def _up(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=True)


def _floor(name: str) -> Floor:
    return Floor(exp_ms(name), "one torch.exp over the up-sampled logits")


# ---- cross-entropy --------------------------------------------------------------------------------------------------


def loss_ours(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return sf.upsampled_cross_entropy(logits, labels, temperature=temperature, backend="cpu")


def loss_channels_last(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return formulas.interpolate_cross_entropy(logits.contiguous(memory_format=torch.channels_last), labels, temperature)


@functools.lru_cache(maxsize=1)
def truth(name: str) -> tuple[Tensor, Tensor]:
    """In float64, by the formula."""
    problem = make_upsampled_problem(name)
    logits = problem.logits.detach().double().requires_grad_()
    up = _up(logits, problem.labels.shape[1:]) / TEMPERATURE
    loss = torch.nn.functional.cross_entropy(up, problem.labels.long(), ignore_index=255)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def check_loss(problem: UpsampledProblem, function: Function) -> None:
    logits = problem.logits.detach().requires_grad_()
    loss = function(logits, problem.labels, TEMPERATURE)
    loss.backward()
    assert logits.grad is not None
    expected, slope = truth(problem.name)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad.double(), slope, rtol=1e-3, atol=1e-5 * slope.abs().max().item())


def loss_step(function: Function, problem: UpsampledProblem) -> None:
    problem.logits.grad = None
    function(problem.logits, problem.labels, TEMPERATURE).backward()


def loss_case(name: str) -> Case:
    problem = make_upsampled_problem(name)
    peers = {
        OURS: loss_ours,
        "interpolate compiled": formulas.interpolate_cross_entropy,
        "interpolate": formulas.interpolate_cross_entropy,
        "interpolate channels_last": loss_channels_last,
    }
    return Case(
        "upsampled_cross_entropy", name, problem.sizes, peers, {},
        refuse_a_wrong_answer=lambda peer, function: check_loss(problem, function),
        call=lambda function: lambda: loss_step(function, problem),
        floor=lambda: _floor(name),
    )  # fmt: skip


# ---- prediction -----------------------------------------------------------------------------------------------------


def prediction_ours(logits: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return sf.upsampled_prediction(logits, size, backend="cpu")


def check_prediction(problem: UpsampledProblem, function: Function) -> None:
    logits, size = problem.logits.detach(), problem.labels.shape[1:]
    labels, confidence = function(logits, size)
    for image in range(len(logits)):
        top = _up(logits[image : image + 1].double(), size)[0].softmax(0).topk(2, 0)
        # eager computes positions in float32
        torch.testing.assert_close(confidence[image].double(), top.values[0], rtol=1e-4, atol=1e-5)
        clear = top.values[0] - top.values[1] > 1e-4
        assert torch.equal(labels[image].long()[clear], top.indices[0][clear]), "other labels"


def prediction_case(name: str) -> Case:
    problem = make_upsampled_problem(name)
    logits, size = problem.logits.detach(), problem.labels.shape[1:]
    peers = {
        OURS: prediction_ours,
        "interpolate compiled": formulas.interpolate_prediction,
        "interpolate": formulas.interpolate_prediction,
    }
    return Case(
        "upsampled_prediction", name, problem.sizes, peers, {},
        refuse_a_wrong_answer=lambda peer, function: check_prediction(problem, function),
        call=lambda function: lambda: function(logits, size),
        floor=lambda: _floor(name),
    )  # fmt: skip


NAMES = shapes.CPU_UPSAMPLED
