"""What every part of `gpu.py` gets, and how it says that it cannot run."""

from __future__ import annotations

import dataclasses
import time

import torch


@dataclasses.dataclass
class Context:
    """Where to run, how small, and until when (time.monotonic)."""

    device: torch.device
    dry: bool
    deadline: float

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


class Skipped(Exception):
    """A part that cannot run here; the text says why."""
