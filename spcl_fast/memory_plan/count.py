"""Bytes that tensors hold, counted operation by operation: of real ones, or of fake ones that hold nothing.

Counted is what torch's operations return. What an operation allocates and frees inside cannot be seen; what is known of it is added as
workspace (`cpu_workspace`).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..train import memory

_CONVOLUTIONS = {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default}
# what a storage counts as, by the phase of its birth
_CATEGORY = {
    "data": "data",
    "forward": "activations",
    "loss": "loss",
    "backward": "backward",
    "step": "optimizer",
    "host": "host",
}


@dataclasses.dataclass
class Counted:
    """Peak bytes, what was alive then by category, the peak of each phase, and the work done."""

    peak: int = 0
    at_peak: dict[str, int] = dataclasses.field(default_factory=dict)
    phases: dict[str, int] = dataclasses.field(default_factory=dict)
    host: int = 0  # bytes in the host's memory at their peak, where an offload keeps them; not part of `peak`
    flops: int = 0  # of convolutions and their gradients: twice the multiplications


class LiveBytes(TorchDispatchMode, memory.PhaseRecorder):
    """Inside, follows every storage from the operation that returns it to its end. `result` since the last `start`."""

    def __init__(self, workspace: Callable[[Any, tuple[Any, ...], Any], int] | None = None) -> None:
        super().__init__()
        self.alive: Counter[str] = Counter()
        self.result = Counted()
        self._workspace = workspace
        self._category: dict[int, str] = {}

    def start(self) -> None:
        """Forget peaks and work; what is alive stays counted."""
        self.result = Counted()
        self._note(0)

    def hold(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count these as `category`: those that were there before, and those that have become something else (a gradient)."""
        for tensor in tensors:
            key = self._see(tensor, category)
            nbytes = tensor.untyped_storage().nbytes()
            self.alive[self._category[key]] -= nbytes
            self.alive[category] += nbytes
            self._category[key] = category

    def enter(self, name: str) -> None:
        super().enter(name)
        self._note(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = _as_it_lies(func, args, func(*args, **(kwargs or {})))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, _CATEGORY[self.phase])
        if func in _CONVOLUTIONS:
            self.result.flops += _flops(func, args, out)
        self._note(self._workspace(func, args, out) if self._workspace is not None else 0)
        return out

    def _see(self, tensor: Tensor, category: str) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._category:
            self._category[key] = category
            self.alive[category] += storage.nbytes()
            weakref.finalize(storage, self._end, key, storage.nbytes()).atexit = False
        return key

    def _end(self, key: int, nbytes: int) -> None:
        self.alive[self._category.pop(key)] -= nbytes

    def _note(self, transient: int) -> None:
        host = self.alive["host"]
        now = self.alive.total() - host + transient
        self.result.host = max(self.result.host, host)
        if now > self.result.phases.get(self.phase, 0):
            self.result.phases[self.phase] = now
        if now > self.result.peak:
            self.result.peak = now
            self.result.at_peak = {
                key: value for key, value in (*self.alive.items(), ("workspace", transient)) if value
            }


def _as_it_lies(func: Any, args: tuple[Any, ...], out: Any) -> Any:
    """A fake GroupNorm of torch 2.14 forgets channels_last, which the real one keeps; convolutions after it would be counted as copying."""
    if func is not torch.ops.aten.native_group_norm.default or not isinstance(out[0], FakeTensor):
        return out
    x = args[0]
    if x.dim() != 4 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return out
    return out[0].contiguous(memory_format=torch.channels_last), *out[1:]


def _flops(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """A convolution costs 2 per weight and output pixel; its backward as much for each of the two gradients that is asked for."""
    if func is torch.ops.aten.convolution.default:
        return 2 * args[1].numel() * out.shape[0] * out.shape[2:].numel()
    grad, weight, wanted = args[0], args[2], args[-1]
    return 2 * weight.numel() * grad.shape[0] * grad.shape[2:].numel() * (bool(wanted[0]) + bool(wanted[1]))


def cpu_workspace(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """What oneDNN allocates inside a convolution, as measured call by call (x86 with AVX-512, torch 2.13; docs/memory.md).

    Tensors that are not channels_last are copied into its own layout; channels_last ones are used as they are, but for the weights. The
    backward of a bfloat16 convolution wider than 1x1 copies input and gradient once more. A float32 one whose outputs are no multiple of 16
    channels, such as a classifier, lays out its columns for a matrix product.
    """
    if func not in _CONVOLUTIONS:
        return 0
    forward = func is torch.ops.aten.convolution.default
    x, weight, y = (args[0], args[1], out) if forward else (args[1], args[2], args[0])
    as_it_is = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    kernel = weight.shape[2:].numel()
    if forward:
        return weight.nbytes + (0 if as_it_is else x.nbytes + y.nbytes)
    total = 2 * weight.nbytes + (0 if as_it_is else 2 * x.nbytes + y.nbytes)
    if kernel > 1 and x.dtype == torch.bfloat16:
        total += x.nbytes + y.nbytes
    if kernel > 1 and x.dtype == torch.float32 and not as_it_is and y.shape[1] % 16:
        total += kernel * x.nbytes
    return total
