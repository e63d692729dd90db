"""The figures of `spcl-fast cross-validate`, for the terminal and as Markdown, from what its JSON holds."""

from __future__ import annotations

import statistics
from typing import Any

from ..data.left_out import counted
from ..runs import layout
from ..runs.reading import number
from .tables import IouRows, iou_rows, rendered, row_of

_SPREAD = "standard deviation over folds"


def folds_table(record: dict[str, Any]) -> str:
    """Nets in columns; IoU by class and mIoU over all labelled images, mIoU on each fold's, and how far folds differ; in percent."""
    table = _with_folds(record)
    return f"{rendered(table.header, table.groups)}{_words(record)}\n"


def folds_page(name: str, record: dict[str, Any]) -> str:
    """The same as a page of Markdown, with the run of each fold and the images that it left out."""
    table = _with_folds(record)
    lines = [f"# {name}: {counted(len(record['folds']), 'fold')}", "", _words(record), ""]
    lines += [_line(table.header), _line(["---", *["---:"] * (len(table.header) - 1)])]
    lines += [_line(row) for group in table.groups for row in group]
    lines += ["", "| fold | run | images left out |", "|---|---|---|"]
    lines += [_line([fold["fold"], f"`{fold['run']}`", ", ".join(fold["images"])]) for fold in record["folds"]]
    return "\n".join(lines) + "\n"


def _with_folds(record: dict[str, Any]) -> IouRows:
    table = iou_rows(record)
    assert table is not None  # a cross-validation has a net
    by_fold = {net: [number(value) for value in found[layout.BY_FOLD]] for net, found in table.nets.items()}
    rows = [
        row_of(
            f"mIoU, fold {fold['fold']} ({counted(len(fold['images']), 'image')})",
            {net: values[index] for net, values in by_fold.items()},
            table.gain,
        )
        for index, fold in enumerate(record["folds"])
    ]
    spread = [_cell(number(found[layout.SPREAD])) for found in table.nets.values()]
    if table.gain:
        before, after = (by_fold[net] for net in table.gain)
        gains = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
        spread.append(_cell(statistics.stdev(gains) if len(gains) > 1 else None))
    return table._replace(groups=[*table.groups, [*rows, [_SPREAD, *spread]]])


def _words(record: dict[str, Any]) -> str:
    learned = " or ".join(map(str, record["learned_from"]))
    return (
        f"mIoU and IoU by class are over all {record['labelled_images']} labelled target images, each predicted by a net that did not "
        f"learn from its label: the nets of each fold learned from {learned} of them. Images that look alike, such as neighbours of one "
        "drive, may be in different folds: on other places expect less."
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
