"""Result lines, results/<pair>.jsonl: only ever added to, the last one of a setting and seed counts. What several say together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.adaptation.plan import what_ran, whole_recipe
from benchmarks.adaptation.sharing import depends_on
from spcl_fast import catalog
from spcl_fast.errors import DataError

# Nets that do not depend on how a run adapts: trained once, they serve every setting. An oracle never sees the source, so that pairs with
# the same target share it, too; but its signals on source are its pair's alone.
_YARDSTICKS = {row.net: row for row in catalog.with_role("matched", "bound")}
ROUNDING = 0.05  # mIoU: one and the same stage trained on two kinds of CPU differed by up to 0.03, which says nothing of the settings


def add_line(path: Path, line: dict[str, Any]) -> None:
    """In one write, so that seeds side by side do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Every line; none without a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def latest(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(setting, seed) -> its last line; empty without a file. Raises DataError for a line that is none."""
    found = {}
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            line = json.loads(text)
            found[line["setting"], line["seed"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number} is no result: {error!r}. Remove it; the run is made anew from its folder."
            ) from None
    return found


def by_setting(path: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """setting -> seed -> line, with the yardsticks that any line of the folder has for it.

    Raises DataError where the seeds of a setting were run with different recipes.
    """
    every = {file: latest(file) for file in sorted(path.parent.glob("*.jsonl"))}
    measured = _yardsticks(line for lines in every.values() for line in lines.values())
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for (setting, seed), line in sorted(every.get(path, {}).items(), key=lambda item: item[0][1]):
        own = {net: measured[key] for net in _YARDSTICKS if (key := _yardstick_key(net, line)) in measured}
        found.setdefault(setting, {})[seed] = {**line, "nets": {**own, **line["nets"]}}
    for setting, lines in found.items():
        first, *others = (what_ran(line["settings"]) for line in lines.values())
        if any(other != first for other in others):
            raise DataError(
                f"{path}: the seeds of {setting} have different settings. Run the others again, or name the new ones otherwise."
            )
    return found


def _yardsticks(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    nets = ((net, line) for line in lines for net in _YARDSTICKS if net in line["nets"])
    return {_yardstick_key(net, line): {**line["nets"][net], "signals": None} for net, line in nets}


def _yardstick_key(net: str, line: dict[str, Any]) -> str:
    """All that its score depends on: the same key, the same net, whatever else the run has trained."""
    settings = depends_on(_YARDSTICKS[net].name, whole_recipe(line["settings"]))
    if _YARDSTICKS[net].role == "bound":
        settings = {key: value for key, value in settings.items() if not key.startswith("source.")}
    return json.dumps([net, line["seed"], settings], sort_keys=True)


@dataclass(frozen=True)
class Spread:
    """Mean and its standard error; the error of a single value is not known (NaN)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def error(self) -> float:
        n = len(self.values)
        return math.sqrt(sum((v - self.mean) ** 2 for v in self.values) / (n - 1) / n) if n > 1 else math.nan

    def text(self, form: str = ".1f") -> str:
        return (
            f"{self.mean:{form}} ± {self.error:{form.lstrip('+')}}" if len(self.values) > 1 else f"{self.mean:{form}}"
        )


def spread(values: Iterable[float | None]) -> Spread | None:
    """None where there is no value."""
    known = tuple(value for value in values if value is not None)
    return Spread(known) if known else None


def text_of(found: Spread | None, form: str = ".1f") -> str:
    """A cell of a table: empty where there is no value."""
    return "" if found is None else found.text(form)


def miou(line: dict[str, Any], net: str) -> float | None:
    return line["nets"][net]["miou"] if net in line["nets"] else None


def paired(a: dict[Any, dict], net_a: str, b: dict[Any, dict], net_b: str) -> Spread | None:
    """The difference in mIoU, run by run, over the runs (by seed, or by pair and seed) that both have."""
    pairs = [(miou(a[seed], net_a), miou(b[seed], net_b)) for seed in sorted(a.keys() & b.keys())]
    return spread(x - y for x, y in pairs if x is not None and y is not None)
