"""IoU by class as text, for the terminal."""

from __future__ import annotations

import sys
from io import StringIO
from typing import Any

from .. import catalog
from ..runs.reading import number

_TITLES = {row.net: row.title for row in catalog.with_nets()}  # key of summary.json -> name for the reader


def iou_table(summary: dict[str, Any]) -> str:
    """Nets in columns, classes in rows, mIoU last, and the final net's gain over the baseline; in percent.

    `summary`: as summary.json. Nets that are null are left out; any other key whose value has "miou" and "iou" becomes a column too.
    Coloured where the output is a terminal and `rich` is installed; the same figures as plain text elsewhere.
    """
    nets = _nets(summary)
    if not nets:
        return "No net of this run has been evaluated yet."
    first = next((row.net for row in catalog.with_role("baseline") if row.net in nets), None)
    last = next((row.net for row in reversed(catalog.with_role("result")) if row.net in nets), None)
    gain = (first, last) if first and last else None
    header = ["class", *(_TITLES.get(name, name) for name in nets), *(["gain"] if gain else [])]
    classes = [str(name) for name in summary.get("classes") or next(iter(nets.values()))["iou"]]
    rows = [_row(name, {net: number(value["iou"].get(name)) for net, value in nets.items()}, gain) for name in classes]
    rows.append(_row("mIoU", {net: number(value["miou"]) for net, value in nets.items()}, gain))
    return _rendered(header, rows) + _gap(summary)


def _nets(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {
        name: value
        for name, value in summary.items()
        if isinstance(value, dict) and "miou" in value and isinstance(value.get("iou"), dict)
    }
    order = [*_TITLES, *found]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def _row(title: str, values: dict[str, float | None], gain: tuple[str, str] | None) -> list[str]:
    cells = [title, *("-" if value is None else f"{value:.1f}" for value in values.values())]
    if gain:
        before, after = values[gain[0]], values[gain[1]]
        cells.append("-" if before is None or after is None else f"{after - before:+.1f}")
    return cells


def _gap(summary: dict[str, Any]) -> str:
    gap = number(summary.get("gap_closed"))
    between = " and ".join(row.title for row in catalog.with_role("baseline", "bound"))
    return "" if gap is None else f"gap between {between} closed: {100 * gap:.0f}%\n"


def _rendered(header: list[str], rows: list[list[str]]) -> str:
    if sys.stdout.isatty():
        try:
            return _as_rich(header, rows)
        except ImportError:
            pass
    return _as_text(header, rows)


def _as_text(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "  ".join(
            [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()

    rule = "-" * len("  ".join("x" * width for width in widths))
    return "\n".join([line(header), rule, *(line(row) for row in rows[:-1]), rule, line(rows[-1])]) + "\n"


def _as_rich(header: list[str], rows: list[list[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), show_edge=False)
    for index, title in enumerate(header):
        table.add_column(escape(title), justify="left" if index == 0 else "right", no_wrap=True)
    for index, row in enumerate(rows):
        if index == len(rows) - 1:
            table.add_section()
        cells = [escape(cell) for cell in row]
        if header[-1] == "gain" and row[-1] != "-":
            colour = "red" if row[-1].startswith("-") else "green"
            cells[-1] = f"[{colour}]{cells[-1]}[/{colour}]"
        table.add_row(*cells, style="bold" if index == len(rows) - 1 else None)
    text = StringIO()
    # Never narrower than the table: a terminal that is too narrow wraps lines, a table squeezed into it would lose digits.
    console = Console(file=text, force_terminal=True, width=1000)
    console.print(table)
    return text.getvalue()
