"""What the user sees while a stage trains: a live bar on a terminal, otherwise one plain line at every logged step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TextIO

from ..runs.layout import COLUMNS
from ..runs.output import tell

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Progress:
    """Shows logged records of one stage; a context manager. `show=False` (other processes) shows nothing."""

    def __init__(self, stage: str, total: int, done: int, output: TextIO, show: bool = True) -> None:
        self.stage, self.total, self.output, self.show = stage, total, output, show
        self._bar: Any = None
        self._task: Any = None
        if show and is_terminal(output):
            self._bar = _bar(output)
            if self._bar is not None:
                self._task = self._bar.add_task(stage, total=total, completed=done, text="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int) -> None:
        """`done` steps are finished (cheap: called every step)."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def report(self, record: Mapping[str, Any], eta_seconds: float) -> None:
        """A record was logged."""
        if not self.show:
            return
        text = describe(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], text=text)
        else:
            tell(self.output, f"{self.stage} {record['step']}/{self.total}  {text}  eta {duration(eta_seconds)}")


def describe(record: Mapping[str, Any]) -> str:
    """Losses, learning rate, speed, data wait and memory of a record in one line."""
    values = [
        f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float) and name not in COLUMNS
    ]
    values.append(f"lr {record['lr']:.3g}")
    values.append(f"{record['images_per_s']:.3g} images/s")
    values.append(f"data wait {100 * record['data_wait']:.0f} %")
    values.append(f"peak {size(record['peak_memory_bytes'])}")
    return "  ".join(values)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def size(count: float) -> str:
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"


def is_terminal(output: TextIO) -> bool:
    return output.isatty() and os.environ.get("TERM") != "dumb"


def _bar(output: TextIO) -> Any:
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        return None
    what = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())
    when = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
    text = TextColumn("{task.fields[text]}", markup=False)
    return Progress(*what, *when, text, console=Console(file=output), refresh_per_second=4)
