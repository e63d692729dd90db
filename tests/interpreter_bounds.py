"""Bounds for Triton's interpreter: it reads and writes any address it is given, and a wild one damages the test's own process.

Once `install()` has run, an access that no argument of the running launch owns is an error: what the memory checker of a GPU would say.
"""

from __future__ import annotations

import numpy as np
import torch
from triton.runtime import interpreter


class _Checked:
    """The interpreter's loads, stores and atomics, each after a look at its addresses."""

    def __init__(self, wrapped) -> None:
        self.wrapped = wrapped
        self.starts = self.ends = np.empty(0, np.uint64)

    def __getattr__(self, name: str):
        return getattr(self.wrapped, name)

    def allow(self, tensors) -> None:
        storages = sorted(
            {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
        )
        self.starts, self.ends = (np.array([s[i] for s in storages], np.uint64) for i in (0, 1))

    def check(self, pointers, mask, bytes_: int, what: str) -> None:
        inside = np.broadcast_to(mask, pointers.shape).astype(bool)
        addresses = pointers[inside].astype(np.uint64)
        if not addresses.size:
            return
        owner = np.searchsorted(self.starts, addresses, side="right") - 1
        beyond = owner < 0
        if self.ends.size:
            beyond |= addresses + np.uint64(bytes_) > self.ends[owner]
        if beyond.any():
            raise IndexError(f"a kernel {what} {int(beyond.sum())} of {addresses.size} addresses out of bounds")

    def load(self, pointers, mask, other, dtype):
        self.check(pointers, mask, np.dtype(dtype).itemsize, "reads")
        return self.wrapped.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self.check(pointers, mask, values.dtype.itemsize, "writes")
        return self.wrapped.store(pointers, values, mask)

    def atomic_rmw(self, operation, pointers, values, mask, semantics):
        self.check(pointers, mask, values.dtype.itemsize, "updates")
        return self.wrapped.atomic_rmw(operation, pointers, values, mask, semantics)

    def atomic_cas(self, pointers, compare, values, semantics):
        self.check(pointers, np.ones(pointers.shape, bool), values.dtype.itemsize, "updates")
        return self.wrapped.atomic_cas(pointers, compare, values, semantics)


def _tensors(values):
    """Those among the arguments and within operands (tuples)."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def install() -> None:
    if isinstance(interpreter._interpreter, _Checked):
        return
    checked = interpreter._interpreter = _Checked(interpreter._interpreter)
    copied = interpreter.GridExecutor._init_args_hst

    def copied_and_allowed(self, arguments, keywords):
        on_host = copied(self, arguments, keywords)
        checked.allow(_tensors((*on_host[0], *on_host[1].values())))
        return on_host

    interpreter.GridExecutor._init_args_hst = copied_and_allowed
