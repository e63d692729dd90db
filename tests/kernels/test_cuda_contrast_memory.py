"""prototype_contrastive_loss in CUDA C++: memory beyond a tensor, beyond 32 bits or too little of it, many classes, large logits."""

from __future__ import annotations

import pytest
import torch
from cuda_contrast import error_at_large_logits
from cuda_emulator import build, emulated
from on_backends import check, run
from problems import CONTRAST, OPTIONS, named, problem

import spcl_fast as sf

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
LEAVES = ("features", "prototypes")


@pytest.fixture(scope="module")
def built():
    return emulated.Backend(CONTRAST)


@pytest.fixture
def cuda(built):
    with built.taken():
        yield built


def plain(p, **more) -> dict:
    return {"features": p.features, "labels": p.labels, "prototypes": p.prototypes, "temperature": 0.2} | more


# Every input ends where its memory ends: what is read beyond is an error. Rows that begin in the middle of a word, too.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "num_classes"), [((2, 33, 5, 9), 5), ((1, 64, 8, 8), 19), ((1, 35, 3, 22), 40), ((1, 520, 1, 13), 3)]
)
def test_nothing_is_read_outside_of_the_tensors(cuda, shape, num_classes, dtype):
    p = problem(shape, num_classes, (7, 3), dtype)
    expected = run(sf.prototype_contrastive_loss, plain(p), LEAVES, backend="cuda")
    for layout in (torch.contiguous_format, torch.channels_last):
        near = {"features": p.features.contiguous(memory_format=layout), "labels": p.labels.to(torch.uint8)}
        got = run(sf.prototype_contrastive_loss, plain(p, **near, prototypes=p.prototypes.to(dtype)), LEAVES, "cuda")
        for g, e in zip(got, expected, strict=True):
            # the prototypes are of the features' dtype here, and so is their gradient
            torch.testing.assert_close(g, e.to(g.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 2])
def test_offsets_beyond_32_bits(cuda, step, dtype):
    """A view that spans 3 x 2**30 elements of memory, of which a few pages are ever touched."""
    p = problem((2, 2, 3, 21), dtype=dtype)
    memory = torch.empty(3 * 2**30 + 63 * step, dtype=dtype)
    far = memory.as_strided(p.features.shape, (2**31, 2**30, 21 * step, step)).copy_(p.features)
    results = (run(sf.prototype_contrastive_loss, plain(p, features=f), LEAVES, "cuda") for f in (far, p.features))
    for g, e in zip(*results, strict=True):
        torch.testing.assert_close(g, e)


def test_logsumexp_of_large_logits_costs_the_gradient_no_accuracy(cuda):
    assert error_at_large_logits() < 1e-5


def test_65536_classes(cuda):
    p = problem((1, 4, 1, 6), 65536, ignored=0)
    labels = torch.tensor([0, 255, 256, 40000, 65534, 65535]).view(1, 1, 6)
    check(CONTRAST, plain(p, labels=labels, ignore_index=-100), LEAVES, "cuda")


@pytest.mark.parametrize("name", ["plain", "bias", "probabilities, weights, smoothing", "all but variances"])
@pytest.mark.parametrize("num_classes", [5, 90, 200, 330])
def test_a_device_with_little_shared_memory(cuda, name, num_classes):
    """99 KB a block: the weights of 200 classes do not fit, and come in blocks, too."""
    (case,) = named(OPTIONS, name)
    cuda.handle.emulator_shared_limit(99 << 10)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            p = problem((1, 70, 5, 9), num_classes, dtype=dtype)
            check(CONTRAST, case.given(p), case.leaves, "cuda")
    finally:
        cuda.handle.emulator_shared_limit(227 << 10)
