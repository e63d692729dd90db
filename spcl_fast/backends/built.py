"""What setup.py reports about the compiled backends of this installation."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1]
BUILT = "built"


def build_record(part: str) -> str:
    """Of the backend `cpu` or `cuda`: BUILT, or the reason why it is not there."""
    record = FOLDER / f"{part}_build.txt"
    return (
        record.read_text(encoding="utf-8").strip() if record.exists() else "the package was not installed by setup.py"
    )
