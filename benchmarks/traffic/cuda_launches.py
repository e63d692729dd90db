"""CUDA's launches, counted in the emulator of the tests: the kernels' own source, compiled so that each load and store is a call.

cuda = cuda_launches.backend("class_moments")
with cuda_launches.counted(cuda) as launches: sf.class_moments(..., backend="cuda")     # CPU tensors; list of ledger.Launch
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.cuda_emulator import emulated

from .ledger import Launch, Place, Sectors, Wavefronts

FIELDS = 15  # of traffic_launch in traffic.cpp


@functools.cache
def backend(*ops: str, replace: tuple[tuple[str, str, str], ...] = ()) -> emulated.Backend:
    return emulated.Backend(*ops, replace=replace, counted=True)


@contextlib.contextmanager
def counted(cuda: emulated.Backend) -> Iterator[list[Launch]]:
    """In this block backend="cuda" runs the counted kernels on CPU tensors."""
    launches: list[Launch] = []
    cuda.handle.traffic_count(1)
    try:
        with cuda.taken():
            yield launches
    finally:
        cuda.handle.traffic_count(0)
        launches += [_launch(cuda, index) for index in range(cuda.handle.traffic_launches())]


def _launch(cuda: emulated.Backend, index: int) -> Launch:
    values = (ctypes.c_uint64 * FIELDS)()
    cuda.handle.traffic_launch(index, values)
    kernel, blocks, threads, shared_bytes, barriers, _, footprint, *shared, in_flight, count = (
        int(value) for value in values
    )
    rows = np.zeros((count, len(Sectors._fields)), np.int64)
    cuda.handle.traffic_sectors(index, rows.ctypes.data_as(ctypes.c_void_p))
    return Launch(
        _name(cuda.path, _offset(cuda.path, kernel)), blocks, threads, Sectors(*rows[rows[:, 0].argsort()].T.copy()),
        footprint, shared_bytes, barriers, Wavefronts(*shared[:3]), Wavefronts(*shared[3:]), _places(cuda, index), in_flight,
    )  # fmt: skip


def _places(cuda: emulated.Backend, index: int) -> tuple[Place, ...]:
    rows = np.zeros((cuda.handle.traffic_places(index), 5), np.int64)
    cuda.handle.traffic_place(index, rows.ctypes.data_as(ctypes.c_void_p))
    if not len(rows):
        return ()
    offsets = [
        hex(_offset(cuda.path, address) - 1) for address in rows[:, 0].tolist()
    ]  # of the call, not of its return
    command = ["addr2line", "-e", cuda.path, *offsets]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found: dict[tuple[str, bool], Wavefronts] = {}
    for line, (_, written, *counts) in zip(lines, rows.tolist(), strict=True):
        key = Path(line.partition(" (")[0]).name, bool(written)
        found[key] = Wavefronts(*(a + b for a, b in zip(found.get(key, (0, 0, 0)), counts, strict=True)))
    return tuple(Place(line, written, counts) for (line, written), counts in sorted(found.items()))


def _offset(path: Path, address: int) -> int:
    """Of a function within its library."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, start, _, _, *name = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if name and Path(name[0]) == path.resolve() and first <= address < last:
            return address - first + int(start, 16)
    raise LookupError(f"{path} is not mapped where a kernel of its own was launched")


@functools.cache
def _symbols(path: Path) -> dict[int, str]:
    lines = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
    found = (re.fullmatch(r"([0-9a-f]+) [a-zA-Z] (.*)", line) for line in lines)
    return {int(match[1], 16): match[2] for match in found if match}


def _name(path: Path, offset: int) -> str:
    """`some_kernel`, without namespaces, template arguments and parameters."""
    symbol = _symbols(path).get(offset, f"kernel at {offset:#x}")
    return re.sub(r"^.*?(\w+_kernel)\b.*$", r"\1", symbol)
