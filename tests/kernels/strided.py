"""A Triton kernel that reads every `step`-th float: what a strided load costs is told by its sectors and by its verdict."""

from __future__ import annotations

import torch

from benchmarks.traffic import ledger, triton_launches


def counted_copy(step: int) -> tuple[list[ledger.Launch], torch.Tensor]:
    """The launch of four programs that copy 32 floats each, and the tensor that they read."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy_kernel(source, target, step: tl.constexpr, block: tl.constexpr):
        at = tl.program_id(0) * block + tl.arange(0, block)
        tl.store(target + at, tl.load(source + at * step))

    source, target = torch.zeros(1024), torch.zeros(128)
    with triton_launches.counted("sm_90") as launches:
        copy_kernel[(4,)](source, target, step, 32)
    return launches, source
