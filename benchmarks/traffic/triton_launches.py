"""Triton's launches, counted in its interpreter: needs TRITON_INTERPRET=1 before triton is imported.

with triton_launches.counted("sm_90") as launches: ...     # list of ledger.Launch, in order
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from triton.runtime import interpreter

from spcl_fast.kernels import launch

from .ledger import SECTOR, Launch, Sectors


class _Side:
    """Reads, or writes, of one launch: sector -> bytes, requests."""

    def __init__(self) -> None:
        self.bytes, self.requests = Counter[int](), Counter[int]()

    def note(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Distinct bytes and sectors of one request. -> its sectors"""
        first = np.unique(addresses)  # lanes that ask for the same value share it
        sectors, counts = np.unique(first // SECTOR, return_counts=True)
        for sector, count in zip(sectors.tolist(), counts.tolist(), strict=True):
            self.bytes[sector] += count * width
            self.requests[sector] += 1
        return sectors


class _Counting:
    """The interpreter's own loads, stores and atomics, each noted first."""

    def __init__(self, wrapped) -> None:
        self.wrapped = wrapped
        self.begin()

    def __getattr__(self, name: str):
        return getattr(self.wrapped, name)

    def begin(self) -> None:
        self.read, self.written = _Side(), _Side()
        self.readers: defaultdict[int, set] = defaultdict(set)  # sector -> blocks that read it
        self.touched: defaultdict[tuple, set] = defaultdict(set)  # block -> sectors

    def note(self, side: _Side, pointers: np.ndarray, mask, width: int) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].astype(np.int64)
        if addresses.size:
            block = interpreter.interpreter_builder.grid_idx
            sectors = side.note(addresses, width)
            self.touched[block].update(sectors.tolist())
            if side is self.read:
                for sector in sectors.tolist():
                    self.readers[sector].add(block)

    def load(self, pointers, mask, other, dtype):
        self.note(self.read, pointers, mask, np.dtype(dtype).itemsize)
        return self.wrapped.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self.note(self.written, pointers, mask, values.dtype.itemsize)
        return self.wrapped.store(pointers, values, mask)

    def atomic_rmw(self, operation, pointers, values, mask, semantics):
        for side in (self.read, self.written):
            self.note(side, pointers, mask, values.dtype.itemsize)
        return self.wrapped.atomic_rmw(operation, pointers, values, mask, semantics)

    def atomic_cas(self, pointers, compare, values, semantics):
        for side in (self.read, self.written):
            self.note(side, pointers, np.ones(pointers.shape, bool), values.dtype.itemsize)
        return self.wrapped.atomic_cas(pointers, compare, values, semantics)

    def launch(self, kernel: str) -> Launch:
        keys = sorted(self.read.bytes.keys() | self.written.bytes.keys())
        columns = (
            [key * SECTOR for key in keys],
            *([counter[key] for key in keys] for side in (self.read, self.written) for counter in (side.bytes, side.requests)),
            [len(self.readers[key]) for key in keys],
        )  # fmt: skip
        footprint = SECTOR * max((len(sectors) for sectors in self.touched.values()), default=0)
        sectors = Sectors(*(np.array(column, np.int64) for column in columns))
        return Launch(kernel, len(self.touched), None, sectors, footprint)


@contextlib.contextmanager
def tiles_of(arch: str) -> Iterator[None]:
    """The interpreter launches what this architecture would; its own table has small tiles for small tests."""
    own = launch.TABLES["interpreter"]
    launch.TABLES["interpreter"] = launch.TABLES[arch]
    launch.forget()
    try:
        yield
    finally:
        launch.TABLES["interpreter"] = own
        launch.forget()


@contextlib.contextmanager
def counted(arch: str) -> Iterator[list[Launch]]:
    """In this block every launch, with the tiles of `arch`, is noted."""
    launches: list[Launch] = []
    module, called = interpreter._interpreter, interpreter.GridExecutor.__call__
    counting = interpreter._interpreter = _Counting(module)

    def called_and_counted(self, *arguments, **keywords):
        counting.begin()
        called(self, *arguments, **keywords)
        launches.append(counting.launch(self.fn.__name__))

    interpreter.GridExecutor.__call__ = called_and_counted
    try:
        with tiles_of(arch):
            yield launches
    finally:
        interpreter._interpreter, interpreter.GridExecutor.__call__ = module, called
