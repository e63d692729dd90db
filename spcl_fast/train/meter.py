"""Averages of what the steps return, and the first step that was not finite, kept on the device: nothing waits for it before a log line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..errors import NumericError


class Weighted(NamedTuple):
    """A 0-dim value of a step that counts for `weight` (0-dim) in the average: 0 where nothing was there to take it of."""

    value: Tensor
    weight: Tensor


Values = Mapping[str, Tensor | Weighted]  # what a step returns, by name


@dataclass(frozen=True)
class Reading:
    """What a log line shows: averages of scalars (none where no step had a weight) and last values of vectors; and, by loss name, the first
    step whose value was not finite.
    """

    values: dict[str, float | list[float]]
    bad: dict[str, int]


class Meter:
    """Accumulates the dicts that `step` returns: scalars are averaged since `reset`, of vectors the last value counts."""

    def __init__(self) -> None:
        # scalars of one step travel as one vector; steps may return different sets of names, each set has its own sum
        # [2, n]: weighted values and weights
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._first_bad: dict[tuple[str, ...], Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        self._before: dict[str, tuple[float, float]] = {}  # sums and weights carried over by a resume

    def add(self, values: Values, step: int) -> None:
        """Add what iteration `step` returned; about five small kernels, no wait for the device."""
        scalars: dict[str, Tensor | Weighted] = {}
        for name, value in values.items():
            if isinstance(value, Weighted) or value.dim() == 0:
                scalars[name] = value
            else:
                self._vectors[name] = value.detach()
        if not scalars:
            return
        names = tuple(scalars)
        row = _row([*scalars.values()])
        bad = torch.where(row[0].isfinite(), math.inf, float(step))
        self._sums[names] = self._sums[names] + row if names in self._sums else row
        self._first_bad[names] = torch.minimum(self._first_bad[names], bad) if names in self._first_bad else bad

    def read(self) -> Reading:
        """Averages over the steps and over the processes. The one place that waits for the device: one copy to the host."""
        totals, bad, vectors = self._to_host()
        merged: dict[str, list[float]] = {}
        gathered = distributed.gather_objects((totals, bad, vectors))
        for part, _, _ in gathered:
            for name, (total, count) in part.items():
                entry = merged.setdefault(name, [0.0, 0.0])
                entry[0] += total
                entry[1] += count
        values: dict[str, float | list[float]] = {
            name: total / count for name, (total, count) in merged.items() if count
        }
        for name in vectors:
            rows = [part[name] for _, _, part in gathered if name in part]
            values[name] = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        steps = {
            name: min(part.get(name, math.inf) for _, part, _ in gathered) for _, part, _ in gathered for name in part
        }
        return Reading(values, {name: int(step) for name, step in steps.items() if step != math.inf})

    def reset(self) -> None:
        """Start the averages anew; bad steps stay known."""
        self._sums.clear()
        self._vectors.clear()
        self._before.clear()

    def state(self) -> dict[str, list[float]]:
        """Sums and weights since `reset`, for a checkpoint between two log lines (this process's)."""
        return {name: [total, count] for name, (total, count) in self._to_host()[0].items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._before = {name: (float(total), float(count)) for name, (total, count) in state.items()}

    def _to_host(self) -> tuple[dict[str, tuple[float, float]], dict[str, float], dict[str, list[float]]]:
        pieces = [sums.reshape(-1) for sums in self._sums.values()] + list(self._first_bad.values())
        pieces += [vector.double().reshape(-1) for vector in self._vectors.values()]
        flat = iter(torch.cat(pieces).tolist() if pieces else [])
        totals = dict(self._before)
        for names in self._sums:
            sums, weights = ([next(flat) for _ in names] for _ in range(2))
            for name, total, weight in zip(names, sums, weights, strict=True):
                old_total, old_weight = totals.get(name, (0.0, 0.0))
                totals[name] = (old_total + total, old_weight + weight)
        bad: dict[str, float] = {}
        for names in self._first_bad:
            for name in names:
                bad[name] = min(next(flat), bad.get(name, math.inf))
        vectors = {name: [next(flat) for _ in range(value.numel())] for name, value in self._vectors.items()}
        return totals, bad, vectors


def _row(scalars: Sequence[Tensor | Weighted]) -> Tensor:
    """[2, n] double: weighted values and weights."""
    values = [value.value if isinstance(value, Weighted) else value for value in scalars]
    row = torch.stack([value.detach().double() for value in values])
    weights = torch.ones_like(row)
    for i, value in enumerate(scalars):
        if isinstance(value, Weighted):
            weights[i] = value.weight.detach()
    return torch.stack([row * weights, weights])


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of a floating tensor that holds NaN or infinity, or None. Waits for each device once."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floating:
        return None
    # min and max are finite exactly if all elements are, and form no mask as large as the tensor
    whole: dict[torch.device, list[Tensor]] = {}
    order: list[str] = []
    for device in {tensor.device for tensor in floating.values()}:
        own = {name: tensor for name, tensor in floating.items() if tensor.device == device}
        order += own
        whole[device] = [torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all() for tensor in own.values()]
    flags = [flag for own in whole.values() for flag in torch.stack(own).tolist()]
    return next((name for name, flag in zip(order, flags, strict=True) if not flag), None)


def numeric_error(
    stage: str, what: str, step: int, names: list[str], before: list[str], checkpoint: str
) -> NumericError:
    files = ", ".join(names) or "(the batch has no names)"
    earlier = f" (the step before: {', '.join(before)})" if before else ""
    return NumericError(
        f"{what} is not finite at step {step} of {stage}. Files of that batch: {files}{earlier}. {checkpoint} "
        "Look at these files; if they are sound, lower the learning rate or use precision fp32, and start again."
    )
