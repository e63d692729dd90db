"""From counts to a verdict: what limits a kernel at a quoted shape, and the share of copy speed that the counts allow.

Each resource gives a lower bound on a kernel's time, all of them multiples of the same unit, so that no time is stated:

    DRAM bytes       (features + gradient + the rest, each sector once; a second read where the blocks in flight exceed L2) / bandwidth
    bytes in flight  DRAM bytes * max(1, what must be on its way / what resident blocks keep on its way)
    waves            DRAM bytes * ceil(w) / w, w = blocks / (multiprocessors * resident blocks)
    L2               sectors requested / L2's bandwidth
    shared memory    wavefronts / (multiprocessors * clock)
    FMA, tensor      2 N D K * products / rate; K as it is padded to a block
    exponentials     N K per softmax / (16 * multiprocessors * clock)
    issue slots      the hot loop's instructions * trips * warps / (4 * multiprocessors * clock)

The largest names the limiter; DRAM, where none is more than a tenth above it. The share of copy speed is what must move at least (S
forward; 2 S backward) over the sum of the kernels' largest. Counted: bytes, sectors, wavefronts, blocks, bytes in flight of cp.async.
Static: registers, resident blocks, instructions, stages.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .machines import Machine

DRAM, FLIGHT, WAVES, CACHE, SHARED, FMA, TENSOR, EXP, ISSUE = (
    "DRAM bytes", "bytes in flight", "waves", "L2", "shared memory", "FMA", "tensor", "exponentials", "issue slots",
)  # fmt: skip
SAME = 1.1


class Work(NamedTuple):
    """What one launch does, at full size."""

    name: str
    dram_bytes: float
    cache_bytes: float  # of L2: sectors requested
    wavefronts: float = 0
    flop: float = 0
    is_half: bool = False
    exponentials: float = 0
    instructions: float = 0  # of warps
    blocks: float | None = None  # None: as many as suit the sizes, a whole wave or little less
    resident_blocks: int | None = None  # of a multiprocessor
    in_flight_bytes: float | None = None  # of a block; None: not known


class Verdict(NamedTuple):
    limiter: str
    share: float  # of copy speed
    kernel: str  # the one that takes longest


def bounds(work: Work, machine: Machine) -> dict[str, float]:
    """Seconds at the least, by resource; for ratios alone."""
    dram = work.dram_bytes / machine.dram_bytes_s
    found = {
        DRAM: dram,
        CACHE: work.cache_bytes / (machine.cache_bytes_clock * machine.clock_hz),
        SHARED: work.wavefronts / (machine.wavefronts_clock * machine.clocks_s),
        EXP: work.exponentials / (machine.exponentials_clock * machine.clocks_s),
        ISSUE: work.instructions / (machine.issued_clock * machine.clocks_s),
    }
    if work.is_half:
        found[TENSOR] = work.flop / machine.tensor_flop_s
    else:
        found[FMA] = work.flop / (machine.fma_flop_clock * machine.clocks_s)
    if work.resident_blocks and work.in_flight_bytes:
        found[FLIGHT] = dram * max(1.0, machine.in_flight_bytes / (work.resident_blocks * work.in_flight_bytes))
    if work.resident_blocks and work.blocks:
        waves = work.blocks / (machine.multiprocessors * work.resident_blocks)
        # a last wave that is not full: its multiprocessors that have nothing left ask for nothing
        found[WAVES] = dram * math.ceil(waves) / waves if waves > 1 else dram * max(1.0, _idle(work, machine))
    return found


def _idle(work: Work, machine: Machine) -> float:
    """Less than a wave: how much more the busiest multiprocessor has than its share."""
    assert work.blocks is not None
    each = work.blocks / machine.multiprocessors
    return math.ceil(each) / each


def verdict_of(works: list[Work], least_bytes: float, machine: Machine) -> Verdict:
    """least_bytes: that must move whatever the kernels are."""
    found = [(work.name, bounds(work, machine)) for work in works]
    longest = [max(by_resource.values()) for _, by_resource in found]
    kernel, by_resource = found[longest.index(max(longest))]
    limiter = max(by_resource, key=lambda resource: by_resource[resource])
    if by_resource[limiter] <= SAME * by_resource[DRAM]:
        limiter = DRAM
    return Verdict(limiter, min(1.0, least_bytes / machine.dram_bytes_s / sum(longest)), kernel)
