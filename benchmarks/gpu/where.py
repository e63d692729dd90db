"""What every part of `python -m benchmarks.gpu` gets, and how it says that it cannot run."""

from __future__ import annotations

import dataclasses
import time

import torch

from benchmarks import GPU_BACKENDS
from spcl_fast import backends
from spcl_fast.backends.contract import Ask


def named(part: str, backend: str) -> str:
    """What a part is called on a backend: by its own name on the first, else with the backend's, too."""
    return part if backend == GPU_BACKENDS[0] else f"{part}_{backend}"


def backend_of(name: str) -> str:
    """The backend of a part that is called so; one that builds a backend runs on none, so on the first."""
    others = (backend for backend in GPU_BACKENDS[1:] if name.endswith(f"_{backend}") and name != f"build_{backend}")
    return next(others, GPU_BACKENDS[0])


@dataclasses.dataclass
class Where:
    """Where to run, how small, and until when (time.monotonic)."""

    device: torch.device
    dry: bool
    deadline: float
    backend: str = GPU_BACKENDS[0]  # the one that is checked and timed

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def lacks(self, op: str, dtype: torch.dtype, num_classes: int, dim: int) -> str | None:
        """Why the backend cannot do it, or None."""
        return backends.why_not(self.backend, Ask(op, self.device, dtype, num_classes, dim))

    def in_one_pass(self, features: torch.Tensor, num_classes: int):
        """A context in which the loss of such features is formed in one pass, or None where the backend has no such form for them."""
        used = backends.module(self.backend)
        if not hasattr(used, "in_one_pass"):
            return None
        with used.in_one_pass():
            return used.in_one_pass() if used.takes_one_pass(features, num_classes) else None


class Skipped(Exception):
    """A part that cannot run here; the text says why."""
