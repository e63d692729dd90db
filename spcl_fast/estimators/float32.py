"""Running statistics that stay float32, whatever the module around them becomes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Float32Statistics(nn.Module):
    """A module whose floating buffers stay float32 under `.half()` and the like: steps of 1 - keep vanish in bfloat16."""

    def _apply(self, fn, recurse: bool = True) -> Float32Statistics:
        before = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = self._buffers[name]
            if value.dtype == torch.float32 and isinstance(now, Tensor) and now.dtype != torch.float32:
                self._buffers[name] = value.to(now.device)
        return self
