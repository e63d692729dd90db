"""The interpreter says where a kernel leaves its tensors, instead of damaging the process."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
_TROUBLE = "a GPU runs the kernels" if torch.cuda.is_available() else kernels.interpreter_trouble()
pytestmark = pytest.mark.skipif(_TROUBLE is not None, reason=str(_TROUBLE))


@triton.jit
def shifted_copy_kernel(in_ptr, out_ptr, read_shift, write_shift, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(in_ptr + i + read_shift, mask=i < N, other=0.0)
    tl.store(out_ptr + i + write_shift, x, mask=i < N)


def test_masked_lanes_may_point_anywhere():
    given, out = torch.arange(5.0), torch.zeros(5)
    shifted_copy_kernel[(1,)](given, out, 0, 0, N=5, BLOCK=8)
    assert torch.equal(given, out)


@pytest.mark.parametrize(
    ("read", "write", "words"), [(1, 0, "reads 1 of 5"), (-1, 0, "reads 1 of 5"), (0, 2, "writes 2 of 5")]
)
def test_an_access_out_of_bounds_is_an_error(read, write, words):
    given, out = torch.arange(5.0), torch.zeros(5)
    with pytest.raises(triton.runtime.errors.InterpreterError, match=words):
        shifted_copy_kernel[(1,)](given, out, read, write, N=5, BLOCK=8)
