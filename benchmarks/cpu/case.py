"""One op on one shape: whom it is timed against, how an answer is checked, what it can at best take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

OURS = "spcl_fast"
Function = Callable[..., Any]


class Floor(NamedTuple):
    ms: float
    words: str


class Case(NamedTuple):
    op: str
    shape: str
    sizes: dict[str, int]
    peers: Mapping[str, Function]  # `OURS` is among them; a name that ends in " compiled" goes through torch.compile
    missing: Mapping[str, str]  # peers that are not there, and why
    refuse_a_wrong_answer: Callable[[str, Function], None]  # of a peer, its function; raises
    call: Callable[[Function], Callable[[], object]]  # what is timed: forward and backward, or what the op has of them
    floor: Callable[[], Floor]  # measured in the same run


def runnable(case: Case, words: str) -> tuple[dict[str, Function], dict[str, str]]:
    """The peers whose answers are right, compiled where they are to be, and why the others are not there.

    words: peers that are wanted, comma-separated; none: all. A wrong answer of a peer skips it; one of ours raises.
    """
    wanted = [word for word in words.split(",") if word]
    good: dict[str, Function] = {}
    skipped = {name: why for name, why in case.missing.items() if not wanted or name in wanted}
    for name, function in case.peers.items():
        if wanted and name not in wanted:
            continue
        if name.endswith(" compiled"):
            torch._dynamo.reset()
            function = torch.compile(function, dynamic=False)
        try:
            case.refuse_a_wrong_answer(name, function)
        except Exception as error:
            if name == OURS:
                raise
            what = "gives another answer" if isinstance(error, AssertionError) else "does not run here"
            skipped[name] = f"{what}: {_first_line(error)}"
            continue
        good[name] = function
    return good, skipped


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
