"""The report of a run: one HTML page, and tables for the terminal. Reads run folders, nothing else."""

from collections.abc import Callable, Sequence
from pathlib import Path


def write_report(
    run_folder: Path | str, others: Sequence[Path | str] = (), say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write <run_folder>/report.html and return its path; see `report.page`. Imported on first use: it needs matplotlib and jinja2."""
    from .page import write_report as write

    return write(run_folder, others, say)


__all__ = ["write_report"]
