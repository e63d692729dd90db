"""How many blocks a multiprocessor holds at once: NVIDIA's rules of allocation, from registers, threads and shared memory."""

from __future__ import annotations

from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"."""

    shared_bytes: int  # of all blocks; each takes 1 KB more than it asks for
    warps: int
    blocks: int = 32
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(164 << 10, 64),
    89: Multiprocessor(100 << 10, 48, 24),
    90: Multiprocessor(228 << 10, 64),
    100: Multiprocessor(228 << 10, 64),
}
_REGISTER_UNIT = 256  # of a warp
_SHARED_UNIT = 128
_SYSTEM_BYTES = 1 << 10


def resident_blocks(capability: int, threads: int, registers: int, shared_bytes: int) -> int:
    """0: the block does not fit."""
    sm, warps = MULTIPROCESSORS[capability], -(-threads // 32)
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    shared = -(-shared_bytes // _SHARED_UNIT) * _SHARED_UNIT + _SYSTEM_BYTES
    # registers are allotted to the four partitions, warp by warp
    warps_by_registers = sm.registers // 4 // per_warp * 4
    return min(sm.blocks, sm.warps // warps, warps_by_registers // warps, sm.shared_bytes // shared)
