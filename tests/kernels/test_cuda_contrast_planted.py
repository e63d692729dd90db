"""prototype_contrastive_loss in CUDA C++: bugs planted in the kernels' source are seen by the emulator or by the values."""

from __future__ import annotations

import planted_contrast
import pytest
import torch
from cuda_emulator import build, emulated
from cuda_emulator.planted import Planted
from on_backends import NO_BAD_LABEL, run
from problems import problem

import spcl_fast as sf
from spcl_fast.backends.labels import label_flag

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def planted() -> Planted:
    return planted_contrast.planted()


PROBES = [  # shape, classes, dtype, layout: aligned, odd and gathered rows; logits formed again and saved; every edge ragged
    ((2, 35, 9, 16), 5, torch.float32, torch.contiguous_format),
    ((2, 72, 9, 16), 19, torch.bfloat16, torch.contiguous_format),
    ((2, 600, 1, 75), 19, torch.float16, torch.contiguous_format),
    ((2, 35, 5, 13), 40, torch.bfloat16, torch.contiguous_format),
    ((2, 300, 5, 13), 19, torch.float32, torch.contiguous_format),
    ((2, 20, 5, 13), 2, torch.float32, torch.channels_last),
]


def differentiated(features, labels, prototypes, **settings) -> list[torch.Tensor]:
    given = {"features": features, "labels": labels, "prototypes": prototypes}
    return run(sf.prototype_contrastive_loss, given, ("features", "prototypes"), incoming=torch.ones(()), **settings)


def is_right(backend: emulated.Backend, probe, order: str, monkeypatch) -> bool:
    """Whether value and gradients are what the formula says. All memory ends where its tensor ends; one pixel's norm is under the clamp, an
    ignored pixel is NaN."""
    shape, num_classes, dtype, layout = probe
    features, labels, prototypes, *_ = problem(shape, num_classes, dtype=dtype)
    tiny = (
        (0, slice(None), 0, 0) if dtype != torch.float16 else (slice(0, 0),)
    )  # its gradient, some 1e12, is beyond float16
    features[tiny] = features[tiny] * (0.7e-12 / features[tiny].norm())
    labels[0, 0, 0], labels[1, 0, 1] = 0, 255
    settings = {"temperature": 0.2, "pixel_weight": torch.linspace(0.5, 2, labels.numel()).view(labels.shape)}
    wide = (features.double(), labels, prototypes.double())
    truth = differentiated(*wide, backend="reference", **settings)
    features[1, :, 0, 1] = torch.nan
    memory = build.Guarded(backend.handle)
    inputs = features.contiguous(memory_format=layout), labels, prototypes.to(dtype)
    given = [memory.copy(tensor, alignment=tensor.element_size()) for tensor in inputs]
    bad = labels.clone()
    bad[1, 0, 2] = num_classes
    try:
        with backend.taken(order), monkeypatch.context() as patch:
            patch.setattr(
                torch, "empty_like", lambda t: memory.empty(t.numel(), dtype=t.dtype).as_strided(t.shape, t.stride())
            )
            got = [tensor.double() for tensor in differentiated(*given, backend="cuda", **settings)]
            memory.close()
            sees_bad_label = sf.prototype_contrastive_loss(
                features, bad, prototypes, **settings, backend="cuda"
            ).isnan()
    except (RuntimeError, AssertionError):  # the emulator saw it
        return False
    finally:
        label_flag(features.device).fill_(NO_BAD_LABEL)
    got[1][tiny] *= 1e-12
    truth[1][tiny] *= 1e-12
    slack = 1e-4 if dtype == torch.float32 else 3e-2
    return bool(sees_bad_label) and all(
        (g - t).abs().max() <= slack * t.abs().max() for g, t in zip(got, truth, strict=True)
    )


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("order", ["forward", "random"])
def test_without_a_planted_bug_the_probes_are_right(planted, probe, order, monkeypatch):
    assert is_right(planted.backend, probe, order, monkeypatch)


@pytest.mark.parametrize("name", planted_contrast.WITHOUT_OPTIONS)
def test_a_planted_bug_is_seen(planted, name, monkeypatch):
    orders = ("forward", "random", "reverse")
    with planted.bug(name):
        assert not all(is_right(planted.backend, probe, order, monkeypatch) for order in orders for probe in PROBES)
