"""prototype_contrastive_loss with options in CUDA C++: bugs planted in the kernels' source are seen by the emulator or by the values."""

from __future__ import annotations

import oracle
import planted_contrast
import pytest
import torch
from cuda_contrast import error_at_large_logits
from cuda_emulator import build, emulated
from cuda_emulator.planted import Planted
from on_backends import NO_BAD_LABEL, run
from problems import OPTIONS, named, problem

import spcl_fast as sf
from spcl_fast.backends.labels import label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_contrast.planted()


# Shape, classes, dtype, option, other arguments: every option; classes in one block and in several, channels in one slice and in two.
PROBES = [
    ((2, 37, 5, 13), 23, torch.float32, "all but variances", {}),
    ((2, 37, 3, 9), 330, torch.float32, "all but variances", {}),
    ((2, 70, 5, 13), 300, torch.bfloat16, "probabilities, weights, smoothing", {}),
    ((2, 20, 5, 13), 5, torch.float32, "sigmoid, probabilities, weights, bias", {"labels": torch.float16}),
    ((1, 300, 5, 9), 260, torch.float32, "temperature", {"temperature": torch.tensor(0.05)}),
    ((2, 37, 5, 13), 100, torch.float32, "variances with the rest", {}),
    ((2, 71, 5, 13), 140, torch.bfloat16, "no positive variance, class weight", {"variances": 11.0}),
]


def _changed(tensor: torch.Tensor, change: torch.Tensor | torch.dtype | float) -> torch.Tensor:
    """In another dtype, multiplied, or another one."""
    if isinstance(change, torch.dtype):
        return tensor.to(change)
    return change * tensor if isinstance(change, float) else change


def is_right(backend: emulated.Backend, probe, order: str) -> bool:
    """Whether value and gradients are what the formula says, and a bad probability is seen."""
    shape, num_classes, dtype, name, change = probe
    (case,) = named(OPTIONS, name)
    given = case.given(problem(shape, num_classes, dtype=dtype, patch=(1, 1)))
    given |= {key: _changed(given[key], value) for key, value in change.items()}
    truth = run(oracle.contrast, given, case.leaves, leaf_dtype=torch.float64, incoming=torch.ones(()))
    try:
        with backend.taken(order):
            got = run(sf.prototype_contrastive_loss, given, case.leaves, "cuda", incoming=torch.ones(()))
            seen = error_at_large_logits() < 1e-5
            if given["labels"].is_floating_point():
                given["labels"][0, 1, 2, 2] = -1
                seen &= bool(sf.prototype_contrastive_loss(**given, backend="cuda").isnan())
    except (RuntimeError, AssertionError):  # the emulator saw it
        return False
    finally:
        label_flag(torch.device("cpu")).fill_(NO_BAD_LABEL)
    slack = 1e-4 if dtype == torch.float32 else 3e-2
    return bool(seen) and all(
        (g.double() - t).abs().max() <= slack * t.abs().max() for g, t in zip(got, truth, strict=True)
    )


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("order", ["forward", "random"])
def test_without_a_planted_bug_the_option_probes_are_right(planted, probe, order):
    assert is_right(planted.backend, probe, order)


@pytest.mark.parametrize("name", planted_contrast.WITH_OPTIONS)
def test_a_planted_bug_of_an_option_is_seen(planted, name):
    with planted.bug(name):
        assert not all(is_right(planted.backend, probe, order) for order in ("forward", "random") for probe in PROBES)


def test_an_element_that_no_thread_writes_is_seen_right_after_the_right_result(planted, monkeypatch):
    """The allocator hands out the memory of the call before, which held the right result."""
    probe = next(p for p in PROBES if p[3] == "temperature")  # more channels than one slice has
    kept = {}
    real = torch.empty_like

    def reused(like, **options):
        return kept.setdefault((like.shape, like.dtype), real(like, **options))

    monkeypatch.setattr(torch, "empty_like", reused)
    assert is_right(planted.backend, probe, "forward") and kept
    with planted.bug("a slice of the first"):
        assert not is_right(planted.backend, probe, "forward")
