"""The curve of mIoU against the number of labelled target images, over the runs of a comparison: a plot, its text and two tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.lines import Line2D

from .. import catalog
from ..data.left_out import counted
from . import pictures
from .comparison import Comparison, Row, control_of
from .plots import FAINT, as_png, drawing, evaluated, images_of, look_of


def section(found: Comparison) -> dict[str, Any]:
    """What the template shows of a comparison."""
    curves = _curves(found.rows)
    stages = [row.name for row in catalog.with_nets() if any(row.name in evaluated(one.run) for one in found.rows)]
    return {
        "own": found.own,
        "plot": pictures.data_uri(_drawn(found, curves), "png") if found.rows else None,
        "alt": "mIoU in percent against the number of labelled target images. " + " ".join(map(_words, curves)),
        "header": [catalog.title(stage) for stage in stages],
        "rows": [_cells(row, stages) for row in found.rows],
        "repeated": _repeated(found.rows),
        "one_count": len({row.count for row in found.rows}) == 1,
        "differences": [(", ".join(names), what) for names, what in found.differences],
        "left_out": found.left_out,
    }


class Curve:
    """The scores of one kind of net, by number of labels."""

    def __init__(self, stage: str, rows: Sequence[Row]) -> None:
        self.stage = stage
        control = stage in catalog.names(catalog.with_role("matched"))
        self.label = f"{catalog.title(stage)}: source and labels" if control else f"final net: {catalog.title(stage)}"
        net_of = control_of if control else (lambda run: run.final)
        self.points = [
            (row.count, miou, row.other_settings)
            for row in rows
            if net_of(row.run) == stage and (miou := row.miou(stage)) is not None
        ]

    def means(self) -> dict[int, float]:
        """Over the runs with the settings of the page's own where a number of labels has any: seeds of one recipe."""
        found = {}
        for count in dict.fromkeys(at for at, _, _ in self.points):
            points = [(miou, other) for at, miou, other in self.points if at == count]
            alike = [miou for miou, other in points if not other]
            found[count] = statistics.fmean(alike or [miou for miou, _ in points])
        return found


def _curves(rows: Sequence[Row]) -> list[Curve]:
    """Of the control, and of each stage whose net is the final one of some run: other kinds of nets are other curves."""
    stages = [row.name for row in (*catalog.with_role("matched"), *catalog.with_role("result"), catalog.HEAD)]
    return [curve for stage in stages if (curve := Curve(stage, rows)).points]


def _words(curve: Curve) -> str:
    return f"{curve.label}: " + ", ".join(f"{miou:.1f} at {count}" for count, miou in curve.means().items()) + "."


def _drawn(found: Comparison, curves: Sequence[Curve]) -> bytes:
    """Numbers of labels stand next to each other in order: 0 and 5 would fall together on a scale that ends at 500."""
    places = {count: at for at, count in enumerate(dict.fromkeys(row.count for row in found.rows))}
    with drawing(7.6, 4.0) as figure:
        axes = figure.subplots()
        for index, curve in enumerate(curves):
            colour, marker = look_of(curve.stage)
            aside = 0.04 * (index - (len(curves) - 1) / 2)  # equal scores of two nets both stay visible
            at = [places[count] + aside for count in curve.means()]
            axes.plot(at, [*curve.means().values()], color=colour)
            for count, miou, other in curve.points:
                axes.scatter(
                    places[count] + aside,
                    miou,
                    s=26,
                    marker=marker,
                    facecolors="white" if other else colour,
                    edgecolors=colour,
                    linewidths=1.1,
                    zorder=3,
                )
        axes.set_xticks([*places.values()], [*map(str, places)])
        axes.set_xlim(-0.4, len(places) - 0.6)
        axes.margins(y=0.12)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("labelled target images (in order, not to scale)")
        axes.set_ylabel(f"mIoU on {images_of(found.rows[0].run)}, %")
        handles = [Line2D([], [], color=look_of(one.stage)[0], marker=look_of(one.stage)[1], ms=5) for one in curves]
        labels = [one.label for one in curves]
        if any(row.other_settings for row in found.rows):
            handles.append(Line2D([], [], linestyle="", marker="o", ms=5, mfc="white", mec=FAINT))
            labels.append("hollow: other settings")
        figure.legend(
            handles, labels, loc="outside upper left", ncols=min(3, len(handles)), handlelength=1.8, columnspacing=1.4
        )
        return as_png(figure)


def _cells(row: Row, stages: Sequence[str]) -> dict[str, Any]:
    seed = row.run.summary.get("seed", row.run.setting("seed"))
    return {
        "name": row.name,
        "count": row.count,
        "seed": "–" if seed is None else str(seed),
        "final": catalog.title(row.run.final) if row.run.final else "–",
        "values": [row.miou(stage) for stage in stages],
        "gain": row.gain,
        "other": row.other_settings,
    }


def _repeated(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Mean and standard deviation over the runs of each number of labels and kind of final net, those of other settings by themselves;
    empty where none was repeated.
    """
    groups: dict[tuple[int, str | None, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.count, row.run.final, row.other_settings), []).append(row)
    if all(len(group) == 1 for group in groups.values()):
        return []
    return [
        {
            "count": f"{count}{'*' if other else ''}",
            "runs": counted(len(group), "run"),
            "final": catalog.title(final) if final else "–",
            "control": _spread([row.miou(control_of(row.run)) for row in group]),
            "miou": _spread([row.miou(final) for row in group]),
            "gain": _spread([row.gain for row in group], sign="+"),
        }
        for (count, final, other), group in groups.items()
    ]


def _spread(values: Sequence[float | None], sign: str = "") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):{sign}.1f}".replace("-", "−")
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.1f}"
