"""IoU by class as text, for the terminal."""

from __future__ import annotations

import sys
from io import StringIO
from typing import Any, NamedTuple

from .. import catalog
from ..config.fold import left_out_words
from ..runs import layout
from ..runs.reading import number

_TITLES = {row.net: row.title for row in catalog.with_nets()}  # key of summary.json -> name for the reader


def iou_table(summary: dict[str, Any]) -> str:
    """Nets in columns, classes in rows, mIoU last, and the final net's gain over the baseline; in percent.

    `summary`: as summary.json. Nets that are null are left out; any other key whose value has "miou" and "iou" becomes a column too.
    Coloured where the output is a terminal and `rich` is installed; the same figures as plain text elsewhere.
    """
    table = iou_rows(summary)
    if table is None:
        return "No net of this run has been evaluated yet."
    left_out = left_out_of(summary)
    return rendered(table.header, table.groups) + (f"on {left_out}\n" if left_out else "") + _gap(summary)


class IouRows(NamedTuple):
    header: list[str]
    groups: list[list[list[str]]]  # rows of cells; a line is drawn between two groups
    nets: dict[str, dict[str, Any]]
    gain: tuple[str, str] | None  # the nets between which it is


def iou_rows(summary: dict[str, Any]) -> IouRows | None:
    """The cells of `iou_table`: a group of classes, and mIoU alone in one; None where no net is there."""
    nets = _nets(summary)
    if not nets:
        return None
    first = next((row.net for row in catalog.with_role("baseline") if row.net in nets), None)
    last = next((row.net for row in reversed(catalog.with_role("result")) if row.net in nets), None)
    gain = (first, last) if first and last else None
    header = ["class", *(_TITLES.get(name, name) for name in nets), *(["gain"] if gain else [])]
    classes = [str(name) for name in summary.get("classes") or next(iter(nets.values()))["iou"]]
    rows = [
        row_of(name, {net: number(value["iou"].get(name)) for net, value in nets.items()}, gain) for name in classes
    ]
    mean = row_of("mIoU", {net: number(value["miou"]) for net, value in nets.items()}, gain)
    return IouRows(header, [rows, [mean]], nets, gain)


def left_out_of(summary: dict[str, Any]) -> str:
    """Which images the figures of a summary are of, where target.fold says so; else nothing."""
    record = summary.get(layout.LEFT_OUT)
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), int) for key in ("images", "labelled_images")
    ):
        return ""
    return left_out_words(record["images"], record["labelled_images"], str(record.get("fold")))


def _nets(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {
        name: value
        for name, value in summary.items()
        if isinstance(value, dict) and "miou" in value and isinstance(value.get("iou"), dict)
    }
    order = [*_TITLES, *found]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def row_of(title: str, values: dict[str, float | None], gain: tuple[str, str] | None) -> list[str]:
    cells = [title, *("-" if value is None else f"{value:.1f}" for value in values.values())]
    if gain:
        before, after = values[gain[0]], values[gain[1]]
        cells.append("-" if before is None or after is None else f"{after - before:+.1f}")
    return cells


def _gap(summary: dict[str, Any]) -> str:
    gap = number(summary.get("gap_closed"))
    between = " and ".join(row.title for row in catalog.with_role("baseline", "bound"))
    return "" if gap is None else f"gap between {between} closed: {100 * gap:.0f}%\n"


def rendered(header: list[str], groups: list[list[list[str]]]) -> str:
    """As text, coloured where the output is a terminal and `rich` is installed."""
    if sys.stdout.isatty():
        try:
            return _as_rich(header, groups)
        except ImportError:
            pass
    return _as_text(header, groups)


def _as_text(header: list[str], groups: list[list[list[str]]]) -> str:
    rows = [header, *(row for group in groups for row in group)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "  ".join(
            [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()

    rule = "-" * len("  ".join("x" * width for width in widths))
    lines = [line(header)]
    for group in groups:
        lines += [rule, *(line(row) for row in group)]
    return "\n".join(lines) + "\n"


def _as_rich(header: list[str], groups: list[list[list[str]]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), show_edge=False)
    for index, title in enumerate(header):
        table.add_column(escape(title), justify="left" if index == 0 else "right", no_wrap=True)
    for number_of_group, group in enumerate(groups):
        if number_of_group:
            table.add_section()
        for row in group:
            cells = [escape(cell) for cell in row]
            if header[-1] == "gain" and row[-1][:1] in ("-", "+") and len(row[-1]) > 1:
                colour = "red" if row[-1].startswith("-") else "green"
                cells[-1] = f"[{colour}]{cells[-1]}[/{colour}]"
            table.add_row(*cells, style="bold" if number_of_group == 1 else None)  # mIoU
    text = StringIO()
    # Never narrower than the table: a terminal that is too narrow wraps lines, a table squeezed into it would lose digits.
    console = Console(file=text, force_terminal=True, width=1000)
    console.print(table)
    return text.getvalue()
