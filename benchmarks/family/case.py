"""One case: the same step by the authors' code and by ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.family.authors import Authors

Step = Callable[[], Mapping[str, Any]]  # one step, gradients made anew -> the tensors that both must agree in
THEIRS, OURS = "authors", "spcl_fast"


class Goal(NamedTuple):
    """What the issue asks for, in times as fast and times less memory; `either`: one of the two is enough, but never slower."""

    time: float
    memory: float
    either: bool = True

    def is_met(self, faster: float, leaner: float) -> bool:
        if self.either:
            return faster >= 1 and (faster >= self.time or leaner >= self.memory)
        return faster >= max(1.0, self.time) and leaner >= self.memory


class Case(NamedTuple):
    name: str
    repository: str
    words: str  # the step and its shape, for the reader
    sizes: Mapping[str, int]
    small: Mapping[str, int]  # of the same problem, to set up what a first call sets up
    problem: Callable[..., SimpleNamespace]  # (**sizes) -> the inputs of both sides
    theirs: Callable[[Authors, SimpleNamespace], Step]
    ours: Callable[[SimpleNamespace], Step]
    goal: Goal = Goal(10, 20)
    tolerance: float = 1e-4  # largest difference, as a share of the largest value
    theirs_gb: float = 1.0  # what their step needs; on a machine with less it is skipped


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(drawn(*shape, seed=seed), dim=-1)


def gradients(loss: Tensor, **leaves: Tensor) -> dict[str, Tensor]:
    """The loss and the gradients of the leaves, which are taken from them."""
    for leaf in leaves.values():
        leaf.grad = None
    loss.backward()
    found: dict[str, Tensor] = {"loss": loss.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        found[name], leaf.grad = leaf.grad, None
    return found


def differences(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference as a share of the largest value, of each tensor."""
    assert theirs.keys() == ours.keys(), f"{sorted(theirs)} and {sorted(ours)}"
    found = {}
    for name, expected in theirs.items():
        expected = expected.double()
        gap = (ours[name].double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        found[name] = float(f"{float(gap):.1e}")
    return found


def refuse_a_difference(case: Case, found: Mapping[str, float]) -> None:
    wrong = {name: gap for name, gap in found.items() if not gap <= case.tolerance}
    if wrong:
        raise AssertionError(f"{case.name}: another answer than the authors' code: {wrong} above {case.tolerance}")
