"""The ledger of one call: which launch read and wrote what, in bytes and in 32-byte sectors, and whose memory it was.

A request is what one warp asks for at once (CUDA), or one block of pointers (Triton, whose warps exist after compilation only). A request
that touches part of a sector moves all of it: `sectors` of a tensor over its bytes is what its layout and the kernel's tiles waste.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

SECTOR = 32  # bytes, on every NVIDIA GPU since Maxwell


class Sectors(NamedTuple):
    """What one launch did to each sector: int64 arrays of equal length."""

    address: np.ndarray
    read_bytes: np.ndarray
    read_requests: np.ndarray
    written_bytes: np.ndarray
    written_requests: np.ndarray
    reading_blocks: np.ndarray


class Wavefronts(NamedTuple):
    """Of shared memory: 32 banks of 4 bytes give one wavefront at a time."""

    counted: int
    ideal: int
    requests: int


class Place(NamedTuple):
    """A line of a kernel's source that reads or writes shared memory."""

    line: str  # file.cuh:123
    written: bool
    wavefronts: Wavefronts


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int | None  # None: Triton's are chosen by its compiler
    sectors: Sectors
    footprint: int  # bytes: the most that one block touches, in whole sectors: no reuse within a block is farther apart
    shared_bytes: int | None = None
    barriers: int | None = None
    shared_read: Wavefronts | None = None
    shared_written: Wavefronts | None = None
    places: tuple[Place, ...] = ()
    in_flight: int | None = None  # bytes of cp.async that a block waited for at once, at most


class Moved(NamedTuple):
    """One tensor's share of a launch, in bytes."""

    read: int  # asked for
    read_sectors: int  # of all requests, in whole sectors
    compulsory: int  # distinct sectors that were read
    written: int
    written_sectors: int
    again_in_block: int  # sectors that a block read and had read before

    def __add__(self, other: Moved) -> Moved:  # type: ignore[override] - fields are added, not appended
        return Moved(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Moved(0, 0, 0, 0, 0, 0)


def moved(launch: Launch, tensor: Tensor | None) -> Moved:
    """What `launch` moved of this tensor's storage."""
    if tensor is None or not tensor.numel():
        return NOTHING
    storage = tensor.untyped_storage()
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    at = launch.sectors.address
    mine = (at + SECTOR > start) & (at < end)
    return _added_up(Sectors(*(column[mine] for column in launch.sectors)))


def all_moved(launches: list[Launch], tensor: Tensor | None) -> Moved:
    return sum((moved(launch, tensor) for launch in launches), NOTHING)


def total(launches: list[Launch]) -> Moved:
    """Of all tensors, workspaces included."""
    return sum((_added_up(launch.sectors) for launch in launches), NOTHING)


def distinct(launch: Launch) -> int:
    """Bytes of all sectors that were read or written, each once."""
    return SECTOR * len(launch.sectors.address)


def common(launch: Launch) -> int:
    """Bytes of the sectors that all blocks read: in a cache there is one of each, however many blocks run."""
    return SECTOR * int((launch.sectors.reading_blocks >= max(2, launch.blocks)).sum())


def _added_up(s: Sectors) -> Moved:
    return Moved(
        int(s.read_bytes.sum()),
        SECTOR * int(s.read_requests.sum()),
        SECTOR * int((s.read_requests > 0).sum()),
        int(s.written_bytes.sum()),
        SECTOR * int(s.written_requests.sum()),
        SECTOR * int((s.read_requests - s.reading_blocks).clip(0).sum()),
    )
