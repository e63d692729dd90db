"""The result lines of a pair as a picture: mIoU of every net, and paired differences, with standard errors and each seed as a dot."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .lines import Spread, by_setting, miou, spread
from .table import NET_NAMES, Lines, differences

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by colour-blind readers too


def plot(path: Path, to: Path) -> Path:
    """Write one PNG and return its path."""
    settings = {name: lines for name, lines in by_setting(path).items() if any("source_only" in line["nets"] for line in lines.values())}
    compared = list(differences(settings))
    figure = Figure(figsize=(12, max(3.5, 0.32 * len(compared) + 1.2)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _nets(left, settings)
    _differences(right, compared)
    figure.suptitle(f"{path.stem}: mean ± standard error over seeds; dots are seeds")
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to)
    return to


def _nets(axes: Axes, settings: Lines) -> None:
    shown = [net for net in NET_NAMES if any(net in line["nets"] for lines in settings.values() for line in lines.values())]
    width = 0.8 / len(settings)
    for i, (name, lines) in enumerate(settings.items()):
        for j, net in enumerate(shown):
            found = spread(miou(line, net) for line in lines.values())
            if found is not None:
                where, label = j - 0.4 + (i + 0.5) * width, f"{name} ({len(lines)} seeds)" if j == 0 else None
                axes.bar(where, found.mean, width * 0.9, color=COLOURS[i % len(COLOURS)], alpha=0.6, label=label)
                axes.errorbar(where, found.mean, _error(found), color="black", capsize=3)
                axes.plot([where] * len(found.values), found.values, ".", color="black", markersize=4)
    axes.set_xticks(range(len(shown)), shown)
    axes.set_ylabel("mIoU on target validation images, %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)


def _differences(axes: Axes, compared: list[tuple[str, Spread]]) -> None:
    axes.axvline(0, color="grey", linewidth=0.8)
    for row, (_, found) in enumerate(compared):
        axes.plot(found.values, [row] * len(found.values), ".", color="#7b8794", markersize=4)
        axes.errorbar(found.mean, row, xerr=_error(found), fmt="o", color="#0072b2", capsize=3, markersize=4)
    axes.set_yticks(range(len(compared)), [what for what, _ in compared], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("paired difference in mIoU")


def _error(found: Spread) -> float | None:
    return found.error if len(found.values) > 1 else None
