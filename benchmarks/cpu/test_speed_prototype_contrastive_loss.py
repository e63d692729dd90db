"""prototype_contrastive_loss, forward + backward, on the CPU next to its peers.

Floor: the larger of 3 S of traffic (S read twice, S written; S = bytes of the features) and the two matrix products by torch.mm.
"""

from __future__ import annotations

import functools

import pytest
import torch

import spcl_fast as sf
from benchmarks.cpu.figures import Problem, floors_ms, note_skipped, set_floor
from benchmarks.peers import formulas

OP = "prototype_contrastive_loss"
TEMPERATURE = 0.1
ROUNDS = {"spcl_fast": 25, "channel_first compiled": 9, "channel_first": 5, "released": 4, "linear_cross_entropy": 3}
PEERS, MISSING = formulas.contrast_peers()


def ours(features, labels, prototypes, temperature):
    return sf.prototype_contrastive_loss(features, labels, prototypes, temperature=temperature, backend="cpu")


def functions() -> dict:
    known = {
        "spcl_fast": ours,
        "released": formulas.released_contrast,
        "channel_first": formulas.channel_first_contrast,
    }
    return known | {name: function for name, function in PEERS.items() if name not in known}


@functools.lru_cache(maxsize=1)
def truth(name_and_problem: tuple[str, Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its gradient at 500 pixels of each image, in float64, by the formula."""
    _, problem = name_and_problem
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


def refuse_a_wrong_answer(function, problem: Problem) -> None:
    problem.features.grad = None
    loss = function(problem.features, problem.labels, problem.prototypes, TEMPERATURE)
    loss.backward()
    expected, gradient = truth((problem.name, problem))
    pixels = problem.features[0, 0].numel()
    got = problem.features.grad.flatten(2)[:, :, torch.arange(0, pixels, max(1, pixels // 500))]
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    problem.features.grad = None


@pytest.mark.parametrize(
    "peer",
    [
        "spcl_fast",
        "channel_first compiled",
        "channel_first",
        "released",
        *sorted({*PEERS, *MISSING} - {"channel_first", "released"}),
    ],
)
def test_forward_and_backward(peer, problem, figure):
    if peer in MISSING:
        note_skipped(OP, problem, peer, MISSING[peer])
        pytest.skip(f"{peer}: {MISSING[peer]}")
    function = functions()[peer.removesuffix(" compiled")]
    if peer.endswith("compiled"):
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False)
    try:
        refuse_a_wrong_answer(function, problem)
    except (NotImplementedError, RuntimeError) as error:
        reason = f"does not run here: {str(error).splitlines()[0]}"
        note_skipped(OP, problem, peer, reason)
        pytest.skip(f"{peer}: {reason}")

    def step():
        problem.features.grad = None
        function(problem.features, problem.labels, problem.prototypes, TEMPERATURE).backward()

    figure(OP, problem, peer, step, ROUNDS.get(peer, 3))
    if peer == "spcl_fast":
        measured = floors_ms(problem.name)
        traffic, products = 1.5 * measured["copy"], measured["products"]
        words = f"max(3 S at the measured copy rate {traffic:.2f} ms, the two products by torch.mm {products:.2f} ms)"
        set_floor(OP, problem, max(traffic, products), words)
