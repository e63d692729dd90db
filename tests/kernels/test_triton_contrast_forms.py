"""Forms of the Triton kernels that no shape of the ops' tests reaches: deep features with many classes, labels beyond 2**24 pixels."""

from __future__ import annotations

import pytest
import torch
from on_backends import GPU, check, home
from problems import CONTRAST, problem

from spcl_fast.backends.labels import label_flag

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
from spcl_fast.kernels.operands import Labels, Size  # noqa: E402
from spcl_fast.kernels.pixels import read_class  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
if not GPU and (trouble := kernels.interpreter_trouble()):
    pytest.skip(trouble, allow_module_level=True)


@triton.jit
def classes_kernel(labels, out_ptr, first, size, N: tl.constexpr):
    n = first + tl.arange(0, N)
    cls, _ = read_class(labels, 1, n, n >= 0, size)
    tl.store(out_ptr + tl.arange(0, N), cls)


def test_half_floats_with_both_dimensions_large(monkeypatch):
    monkeypatch.setattr("spcl_fast.kernels.prototype_contrastive_loss.problem.RESIDENT_DIM", 16)
    p = problem((1, 40, 3, 7), 70, dtype=torch.float16)
    given = {"features": p.features, "labels": p.labels, "prototypes": p.prototypes, "temperature": 0.3}
    check(CONTRAST, given, ("features", "prototypes"), "triton")


@pytest.mark.parametrize("width", [1, 2**24 + 13])
def test_labels_of_the_features_own_grid_are_read_where_they_are_beyond_2_24(width):
    """float32 has no odd numbers there. The labels begin at pixel `first`: nothing large is allocated."""
    device, first, pixels = home("triton"), 2**24 - 3, 2**24 + 13
    labels = torch.arange(16, dtype=torch.uint8, device=device)
    classes = torch.empty(16, dtype=torch.int32, device=device)
    height = pixels // width
    own_grid = Labels(labels, label_flag(device), height, width, 1.0, 1.0, -first, 1, 1, 255)
    classes_kernel[(1,)](own_grid, classes, first, Size(pixels, width, 1, 19), 16)
    assert classes.tolist() == list(range(16))
