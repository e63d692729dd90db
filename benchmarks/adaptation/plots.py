"""The result lines of a pair as a picture: mIoU of every net, and paired differences, with standard errors and each seed as a dot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.adaptation.lines import Spread, by_setting, miou, spread
from benchmarks.adaptation.table import NET_NAMES, differences
from spcl_fast import catalog

BLUE = "#0072b2"


def plot(path: Path, to: Path) -> Path:
    """One PNG of the nets of the first setting and of its differences: between its nets, and with the other settings. -> its path."""
    settings = {
        name: lines
        for name, lines in by_setting(path).items()
        if any(row.net in line["nets"] for line in lines.values() for row in catalog.with_role("baseline"))
    }
    first = next(iter(settings))
    compared = [
        (what, found) for what, found in differences(settings) if what.startswith((f"{first}: ", f"{first} - "))
    ]
    figure = Figure(figsize=(12, max(3.5, 0.32 * len(compared) + 1.2)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    _nets(left, settings[first])
    left.set_title(f"{first}, {len(settings[first])} seeds", fontsize=9)
    _differences(right, compared)
    figure.suptitle(f"{path.stem}: mean ± standard error over seeds; dots are seeds")
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to)
    return to


def _nets(axes: Axes, lines: dict[int, dict[str, Any]]) -> None:
    found = {net: spread(miou(line, net) for line in lines.values()) for net in NET_NAMES}
    shown = {net: values for net, values in found.items() if values is not None}
    for where, values in enumerate(shown.values()):
        axes.bar(where, values.mean, 0.7, color=BLUE, alpha=0.6)
        axes.errorbar(where, values.mean, _error(values), color="black", capsize=3)
        axes.plot([where] * len(values.values), values.values, ".", color="black", markersize=4)
    axes.set_xticks(range(len(shown)), list(shown))
    axes.set_ylabel("mIoU on target validation images, %")


def _differences(axes: Axes, compared: list[tuple[str, Spread]]) -> None:
    axes.axvline(0, color="grey", linewidth=0.8)
    for row, (_, found) in enumerate(compared):
        axes.plot(found.values, [row] * len(found.values), ".", color="#7b8794", markersize=4)
        axes.errorbar(found.mean, row, xerr=_error(found), fmt="o", color=BLUE, capsize=3, markersize=4)
    axes.set_yticks(range(len(compared)), [what for what, _ in compared], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("paired difference in mIoU")


def _error(found: Spread) -> float | None:
    return found.error if len(found.values) > 1 else None
