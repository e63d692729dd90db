"""class_moments of the cuda backend, its own kernels in the emulator, against a float64 one-hot product."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from cuda_emulator import build

import spcl_fast as sf

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def cuda():
    from cuda_emulator.emulated import Backend

    return Backend("class_moments")


def problem(shape, num_classes, size=None, dtype=torch.float32, layout="nchw", seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, dim, height, width = shape
    size = size or (height, width)
    coarse = torch.randint(0, num_classes, (batch, -(-size[0] // 3), -(-size[1] // 5)), generator=generator)
    labels = coarse.repeat_interleave(3, 1).repeat_interleave(5, 2)[:, : size[0], : size[1]].contiguous()
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return laid_out(torch.randn(shape, generator=generator).to(dtype), layout), labels


def laid_out(features, layout):
    """The same values in other strides; what lies between them is NaN."""
    batch, dim, height, width = features.shape
    if layout == "channels_last":
        return features.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return features.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "cropped":
        room = torch.full((batch, dim + 1, height + 2, width + 3), torch.nan, dtype=features.dtype)
        room[:, 1:, 1:-1, 2:-1] = features
        return room[:, 1:, 1:-1, 2:-1]
    return features.contiguous()


def moments(cuda, features, labels, num_classes, order="forward", **settings):
    """On copies whose memory ends where theirs ends: reading beyond is an error and not a number."""
    memory = build.Guarded(cuda.handle)
    given = features if features.is_contiguous() is False and not dense(features) else memory.copy(features, alignment=2)
    try:
        with cuda.taken(order):
            return sf.class_moments(given, memory.copy(labels, alignment=1), num_classes, backend="cuda", **settings)
    finally:
        del given
        memory.close()


def dense(features):
    return features.numel() == 1 + sum((n - 1) * s for n, s in zip(features.shape, features.stride(), strict=True))


def assert_right(got, features, labels, num_classes, normalize=True):
    truth = oracle.moments(features, labels, num_classes, normalize=normalize)
    eager = oracle.moments(features, labels, num_classes, normalize=normalize, dtype=torch.float32)
    assert torch.equal(got.counts, truth[1])
    oracle.assert_as_accurate(got.sums, eager[0], truth[0])
    if got.squares is not None:
        oracle.assert_as_accurate(got.squares, eager[2], truth[2])


# dim 2000 holds few pixels a tile, 600 classes leave few ranges: the norms are a pass of their own
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed", "cropped"])
@pytest.mark.parametrize(
    ("shape", "num_classes"), [((2, 40, 7, 9), 5), ((1, 130, 8, 32), 19), ((1, 1100, 5, 13), 2), ((2, 33, 5, 7), 600), ((3, 1, 1, 1), 1)]
)
def test_sums_counts_and_squares(cuda, shape, num_classes, layout, dtype):
    features, labels = problem(shape, num_classes, dtype=dtype, layout=layout)
    got = moments(cuda, features, labels, num_classes, squares=True)
    assert_right(got, features, labels, num_classes)
