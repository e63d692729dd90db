"""The one-pass kernel of prototype_contrastive_loss: bugs planted in its source are seen by the emulator or by the values."""

from __future__ import annotations

import oracle
import planted_contrast
import pytest
import torch
from cuda_emulator import build
from cuda_emulator.planted import Planted
from on_backends import NO_BAD_LABEL
from problems import problem
from test_cuda_one_pass import run, taken, value_and_gradient

from spcl_fast.backends.labels import label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_contrast.planted()


PROBES = [  # shape, classes, dtype, layout, settings: clusters of 1, 4 and 8
    ((2, 33, 5, 13), 5, torch.float32, torch.channels_last, {"reduction": "sum", "normalize": False}),
    ((2, 1030, 9, 8), 3, torch.bfloat16, torch.contiguous_format, {}),
    ((2, 2050, 1, 75), 19, torch.float32, torch.contiguous_format, {}),
    ((3, 2, 121, 117), 2, torch.float32, torch.contiguous_format, {}),
]


def is_right(backend, probe, order: str, monkeypatch) -> bool:
    """Whether value and gradient are what the formula says; all memory ends where its tensor ends; a bad label is seen."""
    shape, num_classes, dtype, layout, settings = probe
    features, labels, prototypes = problem(shape, num_classes, dtype=dtype)[:3]
    weights = {"pixel_weight": torch.linspace(0.5, 2, labels.numel()).view(labels.shape)}
    settings = {"temperature": 0.2, **weights, **settings}
    truth = value_and_gradient(oracle.contrast, features.double(), labels, prototypes.double(), -2.0, **settings)
    memory = build.Guarded(backend.handle)
    inputs = features.contiguous(memory_format=layout), labels, prototypes.to(dtype)
    given = [memory.copy(tensor, alignment=tensor.element_size()) for tensor in inputs]
    bad = labels.clone()
    bad[1, 0, 2] = num_classes
    try:
        with taken(backend, order), monkeypatch.context() as patch:
            patch.setattr(
                torch, "empty_like", lambda t: memory.empty(t.numel(), dtype=t.dtype).as_strided(t.shape, t.stride())
            )
            got = [tensor.double() for tensor in run(*given, -2.0, **settings)]
            memory.close()
            loss, grad = run(features, bad, prototypes, **settings)
            seen = (
                loss.isnan()
                and torch.equal(grad.isnan().all(1), bad != 255)
                and torch.equal((grad == 0).all(1), bad == 255)
            )
    except (RuntimeError, AssertionError):  # the emulator saw it
        return False
    finally:
        label_flag(features.device).fill_(NO_BAD_LABEL)
    slack = 1e-4 if dtype == torch.float32 else 3e-2
    return bool(seen) and all((g - t).abs().max() <= slack * t.abs().max() for g, t in zip(got, truth, strict=True))


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("order", ["forward", "random", "block by block"])
def test_without_a_planted_bug_the_one_pass_probes_are_right(planted, probe, order, monkeypatch):
    assert is_right(planted.backend, probe, order, monkeypatch)


@pytest.mark.parametrize("name", planted_contrast.IN_ONE_PASS)
def test_a_planted_bug_of_the_one_pass_is_seen(planted, name, monkeypatch):
    orders = ("forward", "random", "block by block")
    with planted.bug(name):
        assert not all(is_right(planted.backend, probe, order, monkeypatch) for order in orders for probe in PROBES)
