"""Two GPUs as their maker describes them. Nothing here was measured by this project: where a rate is not published, what stands for it."""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    name: str
    triton_arch: str
    cuda_arch: str
    capability: int
    multiprocessors: int
    clock_hz: float
    dram_bytes_s: float
    cache_bytes: int  # L2
    cache_bytes_clock: int  # L2 to the multiprocessors
    tensor_flop_s: float  # bfloat16, dense
    fma_flop_clock: int = 2 * 128  # of a multiprocessor: CUDA C++ Programming Guide, "Arithmetic Instructions"
    exponentials_clock: int = 16  # of a multiprocessor, the same table
    issued_clock: int = 4  # warp instructions of a multiprocessor: one per partition
    wavefronts_clock: int = 1  # of a multiprocessor's shared memory: 128 bytes
    # that a multiprocessor keeps on their way at copy speed: assumed, by Little's law for about 1 us
    in_flight_bytes: int = 32 << 10

    @property
    def clocks_s(self) -> float:
        return self.multiprocessors * self.clock_hz


# NVIDIA H200 data sheet: 4.8 TB/s, 989 TFLOP/s dense bf16, 67 TFLOP/s fp32 (132 multiprocessors x 256 x 1.98 GHz). NVIDIA publishes no
# bandwidth of its L2; 5120 bytes per clock are those of the A100, from its white paper.
H200 = Machine("H200", "sm_90", "sm_90a", 90, 132, 1.98e9, 4.8e12, 50 << 20, 5120, 989e12)
# NVIDIA A100 white paper and data sheet (80 GB, SXM): 2.04 TB/s, 312 TFLOP/s, 19.5 TFLOP/s, 40 MB of L2, 5120 bytes per clock.
A100 = Machine(
    "A100",
    "sm_80",
    "sm_80",
    80,
    108,
    1.41e9,
    2.04e12,
    40 << 20,
    5120,
    312e12,
    fma_flop_clock=2 * 64,
    in_flight_bytes=20 << 10,
)
MACHINES = (H200, A100)
