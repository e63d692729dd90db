"""Calls timed in turn, A B C A B C ...: what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

ROUNDS, SLOW_ROUNDS = 15, 4
_SLOW_MS = 150.0  # calls that take longer run in the first rounds only


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, slow_rounds: int = SLOW_ROUNDS
) -> dict[str, dict[str, float]]:
    """Of each call: median, smallest and interquartile range in milliseconds, and of how many rounds."""
    slow = {name for name, call in calls.items() if milliseconds(call) > _SLOW_MS}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if number < slow_rounds or name not in slow:
                times[name].append(milliseconds(call))
    return {name: summary(found) for name, found in times.items()}


def summary(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    numbers = {"median_ms": middle, "min_ms": min(times), "iqr_ms": high - low}
    return {key: round(value, 3) for key, value in numbers.items()} | {"rounds": len(times)}


def best_ms(call: Callable[[], object], rounds: int = 7) -> float:
    """The best of several, after one to warm up."""
    call()
    return min(milliseconds(call) for _ in range(rounds))
