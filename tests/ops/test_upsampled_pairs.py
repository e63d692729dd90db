"""Every pair of options that the up-sampled ops take on the reference: the C++ and Triton backends compute it, and the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from on_backends import ALL, run, usable

import spcl_fast as sf
from spcl_fast import backends
from spcl_fast.backends.contract import UpsampledLoss

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
CROSS, BINARY = "upsampled_cross_entropy", "upsampled_binary_cross_entropy"
PREDICTION, CONFUSION = "upsampled_prediction", "upsampled_confusion"
SIZE = (3, 4)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


LABELS = torch.randint(0, 3, (1, *SIZE), generator=torch.Generator().manual_seed(1))
SHARED = {
    "class_weight": (rand(3) + 0.1,),
    "pixel_weight": (rand(1, *SIZE),),
    "temperature": (1.8,),
    "align_corners": (False,),
    "ignore_index": (2,),
    "reduction": ("sum", "none"),
    "denominator": ("all", torch.tensor(7.5)),
    "dtype": (torch.bfloat16,),
}
OPTIONS = {
    CROSS: SHARED
    | {"labels": (LABELS.to(torch.uint64), rand(1, 3, 3, 2)), "label_smoothing": (0.1,), "size": (SIZE,)},
    BINARY: SHARED | {"labels": (LABELS.to(torch.int8),), "gamma": (1.5,)},
    CONFUSION: {key: SHARED[key] for key in ("align_corners", "ignore_index", "dtype")} | {"labels": (LABELS == 1,)},
    PREDICTION: {key: SHARED[key] for key in ("temperature", "align_corners", "dtype")}
    | {"thresholds": (rand(3),), "ignore_index": (254,)},
}  # fmt: skip


def pairs(op: str) -> list[dict]:
    chosen = [(name, value) for name, values in OPTIONS[op].items() for value in values]
    return [dict(pair) for pair in itertools.combinations(chosen, 2) if pair[0][0] != pair[1][0]]


def computed(op: str, options: dict, backend: str) -> list[torch.Tensor]:
    options = dict(options)
    logits = 2 * torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    given = {"logits": logits.to(options.pop("dtype", torch.float32))}
    if op == PREDICTION:
        return [*getattr(sf, op)(**given, size=SIZE, **options, backend=backend)]
    given["labels"] = options.pop("labels", LABELS)
    tensors = {key: options.pop(key) for key in list(options) if isinstance(options[key], torch.Tensor)}
    if op == CONFUSION:
        return [getattr(sf, op)(**given, **options, backend=backend)]
    return run(getattr(sf, op), given | tensors, ["logits"], backend, **options)


def expected(op: str, options: dict) -> list[torch.Tensor] | None:
    """None for a pair that means nothing."""
    try:
        return computed(op, options, "reference")
    except ValueError:
        return None


@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.parametrize("backend", [name for name in ("cpu", "triton") if name in usable(CROSS, among=ALL)])
def test_every_pair_of_options_is_computed(op, backend):
    meant = 0
    for options in pairs(op):
        truth = expected(op, options)
        if truth is None:
            continue
        meant += 1
        half = options.get("dtype", torch.float32) != torch.float32
        for g, t in zip(computed(op, options, backend), truth, strict=True):
            assert g.dtype == t.dtype
            if not g.is_floating_point() and not half:
                assert torch.equal(g, t), options
            elif g.is_floating_point():
                tolerance = {"rtol": 1e-2, "atol": 1e-3} if half else {"rtol": 2e-5, "atol": 1e-6}
                torch.testing.assert_close(g, t, **tolerance, msg=lambda text, o=options: f"{o}: {text}")
    assert meant >= 0.7 * len(pairs(op))


@pytest.mark.parametrize("backend", usable(BINARY, "label_smoothing", "probabilities", among=ALL))
@pytest.mark.parametrize("labels", [LABELS, rand(1, 3, 3, 2)], ids=["labels", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backend_that_lists_soft_targets_of_the_binary_loss_has_them(backend, labels, smoothing, reduction):
    """No argument of the op asks for them so far."""
    logits = 2 * torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    loss = UpsampledLoss(
        logits, labels, rand(3), rand(1, *SIZE), 1.3, True, 255, reduction, smoothing, size=SIZE if labels.dim() == 4 else None
    )  # fmt: skip
    wanted = reduction != "none"
    got = backends.module(backend).upsampled_binary_cross_entropy(loss, wanted)
    for g, t in zip(got, backends.module("reference").upsampled_binary_cross_entropy(loss, wanted), strict=True):
        torch.testing.assert_close(g, t, rtol=2e-5, atol=1e-6)
