"""How an estimator's state moves: the batch of all ranks together, and a new tensor per move."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def summed_over_ranks(*sums: Tensor) -> tuple[Tensor, ...]:
    """Tensors [K, ...] added over all ranks in one all-reduce, in their dtypes; float64 on the way holds counts to 2**53 exactly."""
    packed = torch.cat(
        [values.double().flatten(1) if values.dim() > 1 else values.double()[:, None] for values in sums], 1
    )
    torch.distributed.all_reduce(packed)
    parts = packed.split([values[0].numel() for values in sums], 1)
    return tuple(part.reshape(values.shape).to(values.dtype) for part, values in zip(parts, sums, strict=True))


def is_in_place() -> bool:
    """An exported program and a captured CUDA graph know the buffer by its address. Elsewhere a move makes a new tensor: graphs that were
    recorded before it keep theirs (torch.compile saves a buffer that it moves in place as it is afterwards, so there, too)."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def move_buffers_(module: nn.Module, **moved: Tensor) -> None:
    """Buffers of these names take these values."""
    for name, value in moved.items():
        setattr(module, name, getattr(module, name).copy_(value) if is_in_place() else value)


class ExactBuffers(nn.Module):
    """Buffers that move where the module moves but keep their dtype whatever the module becomes: small steps vanish in half floats."""

    def _apply(self, fn, recurse: bool = True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if now.dtype != buffer.dtype:
                setattr(self, name, buffer.to(now.device))
        return self
