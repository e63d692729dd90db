"""The learning rate over a stage."""

from __future__ import annotations

from collections.abc import Callable

from ..config import TrainConfig


def poly_schedule(train: TrainConfig) -> Callable[[int], float]:
    """Factor on every learning rate at iteration `it` (from 0): linear warm-up times (1 - it / schedule_iterations) ** power."""
    end = train.schedule_iterations or train.iterations

    def factor(it: int) -> float:
        warm = min(1.0, (it + 1) / train.warmup_iterations) if train.warmup_iterations else 1.0
        return warm * max(0.0, 1 - it / end) ** train.power

    return factor
