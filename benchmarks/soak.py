"""benchmarks/results/soak.jsonl: the last outcome of every test of `make soak`, which may run in pieces; docs/reliability.md reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from . import ROOT
from .machine import processor, today

LOG = ROOT / "benchmarks" / "results" / "soak.jsonl"


def keep(log: Path, test: str, outcome: str, seconds: float) -> None:
    """Put a test's outcome into the log, instead of what it had before."""
    line = {
        "test": test.removeprefix("tests/"), "outcome": outcome, "seconds": round(seconds, 1),
        "date": today(), "torch": torch.__version__, "cpu": processor(),
    }  # fmt: skip
    lines = {old["test"]: old for old in read(log)} | {line["test"]: line}
    log.write_text("".join(f"{json.dumps(lines[name])}\n" for name in sorted(lines)), encoding="utf-8")


def read(log: Path = LOG) -> list[dict]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []


def summary(test: str, lines: Iterable[dict]) -> str:
    """What the page says of a test and all its parameters."""
    found = [line for line in lines if line["test"].partition("[")[0] == test]
    if not found:
        return "not run yet"
    dates = sorted({line["date"] for line in found})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    failed = [line["test"].partition("[")[2].rstrip("]") for line in found if line["outcome"] != "passed"]
    ended = (
        f"{len(failed)} of {len(found)} FAILED: {', '.join(failed)}"
        if failed
        else f"{len(found)} of {len(found)} passed"
    )
    return f"{ended} ({when}, {sum(line['seconds'] for line in found) / 60:.1f} minutes, {found[0]['cpu']})"
