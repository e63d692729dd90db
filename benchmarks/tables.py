"""Tables of the pages, and the result files that they are made from."""

from __future__ import annotations

import json
from typing import Any

from benchmarks import RESULTS


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def markdown(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    """numbers: the columns after the first are, and are set to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + ("---:|" if numbers else "---|") * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
