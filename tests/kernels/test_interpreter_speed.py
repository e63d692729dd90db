"""The interpreter with what tests/interpreter_speed.py makes once: the same types, the same refusals, the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
_TROUBLE = "a GPU runs the kernels" if torch.cuda.is_available() else kernels.interpreter_trouble()
pytestmark = pytest.mark.skipif(_TROUBLE is not None, reason=str(_TROUBLE))


def test_a_block_has_one_type_for_each_element_and_shape_and_none_where_no_block_is_possible():
    one = tl.block_type(tl.float32, [4, 8])
    assert one == tl.block_type(tl.float32, [tl.constexpr(4), tl.constexpr(8)]) == one.with_element_ty(tl.float32)
    assert one != tl.block_type(tl.float32, [8, 4]) and one != tl.block_type(tl.int32, [4, 8]) and one != tl.float32
    assert (*one.shape,) == (4, 8) and one.numel == 32 and one.scalar == tl.float32
    far, near = (tl.pointer_type(tl.float32, space) for space in (3, 1))
    assert tl.block_type(far, [4]) != tl.block_type(near, [4])
    for sizes in ([3], [], [2, 1 << 20]):
        with pytest.raises((ValueError, TypeError)):
            tl.block_type(tl.float32, sizes)


@triton.jit
def _sum_kernel(a, b, out, size: tl.constexpr):
    column = tl.arange(0, size)
    grid = tl.load(a + column)[:, None] + tl.load(b + column)[None, :]
    tl.store(out + column[:, None] * size + column[None, :], grid)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float16, torch.float32])
def test_rows_and_columns_add_up_as_in_numpy_and_integers_wrap_around(dtype):
    a, b = (torch.tensor(values).to(dtype) for values in ([127, -3, 2**31 - 1, 5], [1, 0, 2, -7]))
    out = torch.zeros(4, 4, dtype=dtype)
    _sum_kernel[(1,)](a, b, out, 4)
    with np.errstate(over="ignore"):
        assert np.array_equal(out.numpy(), a.numpy()[:, None] + b.numpy()[None, :])
