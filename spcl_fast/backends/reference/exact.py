"""How the formulas are computed: without autocast, summed wide enough that no order of a sum can be seen in the result."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor


def exact(function):
    """Run without autocast and without recording: a loss under autocast is still a float32 loss."""

    @functools.wraps(function)
    def run(*args):
        values = next(arg for arg in args if isinstance(arg, tuple))[0]  # features or logits: first in every struct
        with torch.no_grad(), torch.autocast(values.device.type, enabled=False), _order_of_sums_kept(values):
            return function(*args)

    return run


@contextlib.contextmanager
def _order_of_sums_kept(features: Tensor):
    """Float64 has nothing wider to be summed in, so the order of a sum is seen in it: on the CPU one thread does it all."""
    threads = torch.get_num_threads()
    if features.device.type != "cpu" or features.dtype != torch.float64 or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, on the CPU summed in float64: a threaded GEMM splits its sums by the number of threads, which must not be seen."""
    return a @ b if a.device.type != "cpu" else (a.double() @ b.double()).to(a.dtype)


def fixed_sum(values: Tensor, dim: int | None = None) -> Tensor:
    """A sum in float64, whose order cannot be seen in the float32 result: the same bits for any number of threads."""
    return values.sum(dtype=torch.float64) if dim is None else values.sum(dim, dtype=torch.float64)
