"""Several processes of one run, started by torchrun: who am I, and the few collectives that the loop needs.

Without torchrun every function here is the identity or a no-op, so callers need no branch. A second, gloo, process group carries what
concerns the hosts only (stop requests, settings, checkpoints): asking it never makes the CPU wait for its GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError

BUCKET_BYTES = 64 << 20  # bounds the extra memory of a packed all-reduce
_control: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine: the index of its GPU


def start(device: str = "auto", timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the processes that torchrun started, if it did: nccl where the device is a GPU, gloo otherwise.

    `device` is `LoopConfig.device`. Calling it twice is harmless. Raises ConfigError if torchrun's variables are incomplete.
    """
    global _control
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        what = f"RANK is set but {', '.join(missing)} is not"
        raise ConfigError(f"{what}: start several processes with `torchrun ... -m spcl_fast ...`, or unset RANK.")
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        # here, because a torch without distributed has neither
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if gpu:
            torch.cuda.set_device(world.local_rank)
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
        # torchrun keeps one store over its restarts: without a name of its own, an attempt reads the addresses of dead processes
        own = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "nccl" if gpu else "gloo", store=own, rank=world.rank, world_size=world.size, timeout=timeout
        )
    if _control is None:
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)  # another type only where this process is no member
        _control = group
    return world


def stop() -> None:
    """Leave the process group; nothing to do if there is none."""
    global _control
    _control = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def session(device: str = "auto") -> Iterator[World]:
    """`start` and `stop` around a block; inside another such block the processes stay together."""
    inner = _control is not None
    world = start(device)
    try:
        yield world
    finally:
        if not inner:
            stop()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier(group=_control)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one process. About 0.1 ms; the GPU is not waited for."""
    if world_size() == 1:
        return flag
    agreed = torch.tensor([int(flag)])
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=_control)
    return bool(agreed.item())


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, by rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def broadcast_object(value: Any) -> Any:
    """The main process's value, on every process. The value must survive pickling; the peers of a run trust each other."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def broadcast_tensors(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The main process's CPU tensors, on every process and in the same memory layout; others pass None. Extra memory: one tensor."""
    if world_size() == 1:
        assert tensors is not None
        return tensors
    # the layout of an empty twin: that of the tensor if it is dense, else the plain one
    own = {
        name: (tuple(t.shape), torch.empty_like(t, device="meta").stride(), t.dtype)
        for name, t in (tensors or {}).items()
    }
    result = {}
    for name, (shape, stride, dtype) in broadcast_object(own).items():
        if is_main() and tensors is not None:
            result[name] = tensors[name]
            flat = tensors[name].detach().contiguous().reshape(-1)
        else:
            result[name] = torch.empty_strided(shape, stride, dtype=dtype)
            flat = torch.empty(result[name].numel(), dtype=dtype)
        if flat.numel():
            dist.broadcast(flat.view(torch.uint8), src=0, group=_control)  # bytes: gloo does not know every dtype
        if not is_main():
            result[name].copy_(flat.reshape(shape))
    return result


def all_reduce_(tensors: Sequence[Tensor], *, average: bool = False) -> None:
    """Sum (or average) each tensor over the processes, in place, through packed buffers: one collective per dtype and 64 MiB.

    Every process must pass tensors of the same shapes and dtypes in the same order. Floating dtypes only if `average`.
    All processes end with the same bits. Extra memory: one bucket.
    """
    size = world_size()
    if size == 1:
        return
    for bucket in _buckets(tensors):
        packed = torch.cat([t.detach().reshape(-1) for t in bucket])
        if average:
            packed /= size  # before the sum, so that low-precision gradients do not overflow
        dist.all_reduce(packed)
        for tensor, part in zip(bucket, packed.split([t.numel() for t in bucket]), strict=True):
            tensor.detach().copy_(part.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of one dtype, each as large as fits into BUCKET_BYTES (one tensor at least); the same on every process."""
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        bucket: list[Tensor] = []
        room = BUCKET_BYTES
        for tensor in (t for t in tensors if t.dtype == dtype and t.numel()):
            size = tensor.numel() * tensor.element_size()
            if bucket and size > room:
                yield bucket
                bucket, room = [], BUCKET_BYTES
            bucket.append(tensor)
            room -= size
        if bucket:
            yield bucket
