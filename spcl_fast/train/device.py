"""Where a stage computes and in which precision."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Precision:
    """What a stage wraps its forwards in. Losses and weights stay float32; bfloat16 needs no gradient scaling."""

    device: torch.device
    name: str = "fp32"

    def __post_init__(self) -> None:
        if self.name not in ("fp32", "bf16"):
            raise ConfigError(f"loop.precision: {self.name!r} is not known; expected fp32 or bf16.")
        if (
            self.name == "bf16"
            and self.device.type == "cuda"
            and not torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            raise ConfigError(
                f"loop.precision: {torch.cuda.get_device_name(self.device)} has no bfloat16 (compute capability below 8.0); use fp32."
            )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def choose_device(name: str) -> torch.device:
    """The device that `LoopConfig.device` means in this process: `auto` takes a GPU if there is one, each process of a machine its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"loop.device: {name!r} is not a device; expected auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"loop.device: {name!r} was asked for, but torch {torch.__version__} sees no GPU. Use auto or cpu."
            )
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def move(batch: Any, device: torch.device) -> Any:
    """`batch` (tensors, dataclasses, tuples, lists, dicts) on `device`; copies from pinned memory do not wait."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(
            batch, **{field.name: move(getattr(batch, field.name), device) for field in dataclasses.fields(batch)}
        )
    return batch


def crowded(load: float | None = None) -> str | None:
    """What to say where threads of torch will wait for each other, because other processes keep the machine busy; None where they will not.

    load: processes that want to run, averaged over a minute; None: as the system says.
    """
    threads, cores = (
        torch.get_num_threads(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
    if load is None:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads < 2 or "OMP_NUM_THREADS" in os.environ or load + threads <= 1.5 * cores:
        return None
    return (
        f"warning: other processes keep this machine busy (load {load:.1f} on {cores} cores), and {threads} threads that wait for each "
        "other can be several times slower than one. Wait until it is idle, or set OMP_NUM_THREADS=1."
    )
