"""The picture page of check-data: people look before they read. Images with their labels over them, and the classes of both domains."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.check import DataReport
from ..data.dataset import Dataset
from ..errors import DataError
from ..runs.reading import SAFE_COLOURS
from . import pictures
from .lettering import plot_names, undrawn
from .page import environment
from .plots import as_png, drawing

SHOWN = 12  # images of a split


@dataclass(frozen=True)
class Panel:
    """One split of a domain."""

    title: str
    text: str
    problems: tuple[str, ...]
    images: tuple[tuple[str, str, str | None], ...]  # name, picture, picture with its label over it


def write_data_page(path: Path, reports: Mapping[str, Sequence[DataReport]], verdict: str) -> None:
    """Write one HTML file that needs nothing else. reports: by domain ("source" | "target"), of its splits."""
    every = [(side, report) for side, found in reports.items() for report in found]
    classes = next((report.classes for _, report in every if report.has_labels), every[0][1].classes)
    labelled = [(side, report) for side, report in every if report.has_labels and report.classes == classes]
    shares = {f"{side}, {report.split} ({report.checked} labels)": report.shares for side, report in labelled}
    palette = next(report.dataset.classes.palette for _, report in every if report.dataset is not None)
    histogram = _class_histogram(classes, shares)
    text = (
        environment()
        .get_template("data.html")
        .render(
            verdict=verdict,
            sound=all(report.ok for _, report in every),
            panels=[_panel(side, report) for side, report in every],
            legend=list(zip(classes, (f"rgb{tuple(colour)}" for colour in palette), strict=False)),
            histogram=None if histogram is None else pictures.data_uri(histogram, "png"),
            undrawn=undrawn(classes),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


def _panel(side: str, report: DataReport) -> Panel:
    problems = tuple(f"{problem.name}: {problem.what}" for problem in report.problems)
    assert report.dataset is not None  # check_data sets it
    return Panel(f"{side}, {report.split}", report.text(), problems, tuple(_pictures(report.dataset)))


def _pictures(dataset: Dataset) -> list[tuple[str, str, str | None]]:
    shown = dataset.spread(SHOWN)
    found = []
    for index, name in enumerate(shown.names):
        try:
            image, label = shown.load(index)
        except DataError:
            continue  # among the problems
        pixels = np.asarray(pictures.shrunk(image))
        over = None if label is None else pictures.jpeg(pictures.label_overlay(pixels, label, dataset.classes.palette))
        found.append((name, pictures.jpeg(pixels), over))
    return found


def _class_histogram(classes: Sequence[str], shares: dict[str, np.ndarray]) -> bytes | None:
    """Share of each class in the labelled pixels, a bar per domain or split next to each other; shares: title -> [K]."""
    if not shares or not classes:
        return None
    names, places = plot_names(classes), np.arange(len(classes))
    width = 0.8 / len(shares)
    with drawing(8.6, 0.9 + (0.14 + 0.16 * len(shares)) * len(classes), classes) as figure:
        axes = figure.subplots()
        for number, (title, values) in enumerate(shares.items()):
            offset = (number - (len(shares) - 1) / 2) * width
            bars = axes.barh(
                places + offset, 100 * values, width, color=SAFE_COLOURS[number % len(SAFE_COLOURS)], label=title
            )
            axes.bar_label(
                bars, [f"{100 * v:.2g}" if v else "never" for v in values], padding=3, fontsize=7, color="#52606d"
            )
        axes.set_yticks(places, names)
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.set_xlabel("% of the labelled pixels")
        figure.legend(loc="outside upper left", ncols=len(shares))
        return as_png(figure)
