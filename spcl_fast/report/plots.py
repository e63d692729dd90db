"""The report's plots as PNG bytes. One function a plot; None where the run has nothing to show.

Colours of curves and nets are safe for colour-blind readers; the classes keep the colours of their data set, always with their names
next to them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .. import catalog
from ..runs.layout import COLUMNS
from ..runs.reading import SAFE_COLOURS, RunFolder, number
from .lettering import families, plot_names

BLUE, RED, GREEN, ORANGE, SKY, PINK, BLACK, BROWN = SAFE_COLOURS
INK, FAINT = "#1f2933", "#9aa5b1"
_RESULTS = (BLUE, RED, GREEN, PINK, BROWN)  # of the adapted nets, in the order in which they are trained
_LOOKS = {"baseline": ("#7b8794", "o"), "matched": (SKY, "D"), "start": (ORANGE, "s"), "bound": (BLACK, "|")}
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class or loss called "$" is text
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.dpi": 160,
}


def look_of(stage: str) -> tuple[str, str]:
    """Colour and marker of a stage's net."""
    results = (*catalog.names(catalog.with_role("result")), catalog.HEAD.name)
    if stage in results:
        return _RESULTS[results.index(stage) % len(_RESULTS)], "o"
    role = next((row.role for row in catalog.STAGES if row.name == stage), "")
    return _LOOKS.get(role, (FAINT, "o"))


@contextmanager
def drawing(width: float, height: float, names: Sequence[str] = ()) -> Iterator[Figure]:
    """A figure in the report's style, apart from pyplot's state and the user's settings. names: of classes, which need their letters."""
    style: Any = {**matplotlib.rcParamsDefault, **STYLE, "backend": "agg", "font.family": families(names)}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def as_png(figure: Figure) -> bytes:
    data = BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def evaluated(run: RunFolder) -> list[str]:
    """The stages whose nets have a score, in the order of the method."""
    return [stage for stage in catalog.names(catalog.with_nets()) if stage in run.evaluations]


def images_of(run: RunFolder) -> str:
    """What a score is measured on, for an axis."""
    return f"the target's {'validation' if run.setting('target', 'fold') is None else 'left-out'} images"


def class_scores(run: RunFolder) -> bytes | None:
    """IoU of every class, a mark a net; a line from the baseline to the final net."""
    stages = evaluated(run)
    if not stages or not run.classes:
        return None
    rows = [*plot_names(run.classes), "mIoU"]
    with drawing(8.6, 0.9 + 0.3 * len(rows), run.classes) as figure:
        axes = figure.subplots()
        values = {
            stage: [run.evaluations[stage].iou.get(name) for name in run.classes] + [run.evaluations[stage].miou]
            for stage in stages
        }
        places = np.arange(len(rows), dtype=float)
        places[-1] += 0.35
        if run.baseline and run.final:
            for y, before, after in zip(places, values[run.baseline], values[run.final], strict=True):
                if before is not None and after is not None:
                    colour = BLUE if after >= before else RED
                    axes.plot([before, after], [y, y], color=colour, linewidth=5, alpha=0.22, solid_capstyle="round")
        for stage in stages:
            colour, marker = look_of(stage)
            points = [(value, y) for value, y in zip(values[stage], places, strict=True) if value is not None]
            size = 90 if marker == "|" else 34 if marker == "o" else 22
            edge = {} if marker == "|" else {"edgecolors": "white", "linewidths": 0.8}
            axes.scatter(
                *zip(*points, strict=True),
                s=size,
                c=colour,
                marker=marker,
                label=catalog.title(stage),
                zorder=3,
                **edge,
            )
        axes.axhline(len(rows) - 1.33, color="#cbd2d9", linewidth=0.8)
        axes.set_yticks(places, rows)
        axes.get_yticklabels()[-1].set_fontweight("bold")
        axes.set_ylim(places[-1] + 0.6, -0.6)
        axes.set_xlim(-2, 102)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"IoU on {images_of(run)}, %")
        figure.legend(loc="outside upper left", ncols=len(stages), handletextpad=0.2, columnspacing=1.4)
        return as_png(figure)


def curves(run: RunFolder) -> bytes | None:
    """The losses of every stage, what the contrastive loss is above chance, and the learning rates: a small plot each."""
    stages = [stage for stage in (*catalog.names(catalog.STAGES), *run.metrics) if stage in run.metrics]
    panels: list[tuple[str, str, list[str]]] = []
    for stage in dict.fromkeys(stages):
        title, names = catalog.title(stage), _losses(run.metrics[stage])
        above, agreement = ([name for name in names if name.endswith(end)] for end in ("_excess", "_agreement"))
        panels += [
            (stage, f"{title}: {what}", some)
            for what, some in (
                ("losses", [name for name in names if name not in (*above, *agreement)]),
                ("contrastive loss above chance", above),
                ("share of pixels predicted as labelled", agreement),
            )
            if any(_series(run.metrics[stage], some))
        ]
    if not panels:
        return None
    columns = min(3, len(panels) + 1)
    rows = math.ceil((len(panels) + 1) / columns)
    with drawing(10.6, 2.35 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (stage, title, names) in zip(grid, panels, strict=False):
            _lines(axes, run.metrics[stage], names, title)
        _learning_rates(grid[len(panels)], run)
        for axes in grid[len(panels) + 1 :]:
            axes.set_visible(False)
        figure.supxlabel("iteration", fontsize=9)
        return as_png(figure)


def _learning_rates(axes: Axes, run: RunFolder) -> None:
    for stage, records in run.metrics.items():
        for _, steps, values in _series(records, ["lr"]):
            axes.plot(steps, values, color=look_of(stage)[0], label=catalog.title(stage), marker=_mark(steps), ms=4)
    axes.set_title("learning rate")
    _iterations(axes)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
    axes.legend(loc="best", handlelength=1.2, fontsize=7.5, labelspacing=0.25)


def _losses(records: list[dict[str, Any]]) -> list[str]:
    scalars = (name for record in records for name, value in record.items() if not isinstance(value, list | dict | str))
    return [name for name in dict.fromkeys(scalars) if name not in COLUMNS]


def _series(records: list[dict[str, Any]], names: list[str]) -> Iterator[tuple[str, list[int], list[float]]]:
    for name in names:
        points = [(record["step"], value) for record in records if (value := number(record.get(name))) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            yield name, list(steps), list(values)


def _lines(axes: Axes, records: list[dict[str, Any]], names: list[str], title: str) -> None:
    for colour, (name, steps, values) in zip(itertools.cycle(SAFE_COLOURS), _series(records, names), strict=False):
        label = name.removesuffix("_excess").removesuffix("_agreement").replace("_", " ")
        axes.plot(steps, values, color=colour, label=label, marker=_mark(steps), ms=4)
    if any(name.endswith("_excess") for name in names):
        axes.axhline(0, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_title(title)
    _iterations(axes)
    axes.legend(loc="best", handlelength=1.4)


def _mark(steps: list[int]) -> str | None:
    """A line of fewer than three points needs marks to be seen."""
    return "o" if len(steps) < 3 else None


def _iterations(axes: Axes) -> None:
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def class_shares(run: RunFolder) -> bytes | None:
    """While adapting, on target: the share of pixels predicted as each class and the share with a pseudo-label of it, a small plot a
    class.
    """
    predicted, kept = (_vectors(run, name) for name in ("predicted_share", "kept_share"))
    if predicted is None and kept is None:
        return None
    columns = min(5, len(run.classes))
    rows = math.ceil(len(run.classes) / columns)
    with drawing(10.6, 0.35 + 1.45 * rows, run.classes) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for index, (axes, name) in enumerate(zip(grid, plot_names(run.classes), strict=False)):
            for found, colour, label in ((kept, ORANGE, "has a pseudo-label"), (predicted, BLUE, "predicted")):
                if found is not None:
                    steps, values = found
                    axes.plot(
                        steps,
                        100 * values[:, index],
                        color=colour,
                        label=label if index == 0 else None,
                        marker=_mark(steps),
                        ms=4,
                    )
            axes.set_title(name, fontsize=9)
            axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
            axes.yaxis.set_major_locator(MaxNLocator(3))
            _iterations(axes)
        for axes in grid[len(run.classes) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(run.classes) - columns) : len(run.classes)]:  # the last of each column
            axes.tick_params(labelbottom=True)
        figure.supylabel("% of the target's pixels", fontsize=9)
        figure.supxlabel("iteration of the adaptation", fontsize=9)
        figure.legend(loc="outside upper left", ncols=2)
        return as_png(figure)


def _vectors(run: RunFolder, name: str) -> tuple[list[int], np.ndarray] | None:
    """Vectors with a value per class that a stage logged, the first adapted net's if several did: steps, values [steps, K]."""
    stages = (*catalog.names(catalog.with_role("result")), *run.metrics)
    logging = (stage for stage in stages if any(name in record for record in run.metrics.get(stage, ())))
    stage = next(logging, None)
    logged = [(record["step"], record.get(name)) for record in run.metrics.get(stage or "", ())]
    rows = [(step, [number(value) for value in values]) for step, values in logged if isinstance(values, list)]
    rows = [(step, values) for step, values in rows if len(values) == len(run.classes) and None not in values]
    if not rows or not run.classes:
        return None
    return [step for step, _ in rows], np.array([values for _, values in rows])


def prototype_norms(run: RunFolder) -> bytes | None:
    """Length of each prototype: 1 when all pixels of its class point one way, 0 for a class that was never seen."""
    found = _vectors(run, "prototype_norm")
    if found is None:
        return None
    steps, values = found
    with drawing(5.2, 3.9, run.classes) as figure:
        axes = figure.subplots()
        for index, name in enumerate(plot_names(run.classes)):
            colour = np.array(run.palette[index]) / 255
            axes.plot(steps, values[:, index], color=colour, marker=_mark(steps), ms=4)
            lead = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 1}
            end = (steps[-1], values[-1, index])
            axes.annotate(
                name, end, xytext=(12, 0), textcoords="offset points", arrowprops=lead, fontsize=7.5, va="center"
            )
        _spread(axes)
        axes.set_ylim(0, max(1.05, values.max() * 1.05))
        _iterations(axes)
        axes.set_xlabel("iteration of the adaptation")
        axes.set_title("prototype length")
        return as_png(figure)


def _spread(axes: Axes) -> None:
    """Move the names at the right end of the lines apart, within the axes' height."""
    annotations: list[Any] = list(axes.texts)  # each has the `xy` of its line's end
    names = sorted(annotations, key=lambda text: text.xy[1])
    top = max([1.05, *(text.xy[1] for text in names)])
    gap = min(0.04, 1 / max(1, len(names)))  # in the axes' height
    places: list[float] = []
    for text in names:
        places.append(max(text.xy[1] / top, places[-1] + gap if places else 0.0))
    for index in reversed(range(len(places))):  # what was pushed out at the top comes back in
        places[index] = min(places[index], 1.0 if index == len(places) - 1 else places[index + 1] - gap)
    for text, place in zip(names, places, strict=True):
        # offsets are in points; the axes are about 3.2 inches high
        text.set_position((12, (place - text.xy[1] / top) * 3.2 * 72))


def confusion(run: RunFolder) -> bytes | None:
    """Where the pixels of each true class go, in percent of the class: baseline and final net."""
    known = [(stage, run.evaluations[stage].confusion) for stage in (run.baseline, run.final) if stage]
    matrices = {stage: matrix for stage, matrix in known if matrix is not None and len(matrix) == len(run.classes)}
    if not matrices:
        return None
    count = len(run.classes)
    side, many = max(3.6, 0.4 * count), count > 12  # side by side, many classes would be too small to read
    rows, columns = (len(matrices), 1) if many else (1, len(matrices))
    names = plot_names(run.classes)
    with drawing(1.2 + (side + 0.2) * columns, (side + 1.5) * rows, run.classes) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axes, (stage, matrix) in zip(grid, matrices.items(), strict=True):
            share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
            # square root: small confusions stay visible
            axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=10, aspect="equal")
            for row, column in zip(*np.nonzero(share >= 0.5), strict=True):
                value = share[row, column]
                colour = "white" if value > 45 else INK
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
            axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(count), names)
            axes.grid(False)
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.set_title(catalog.title(stage))
            axes.set_xlabel("predicted")
            axes.set_ylabel("true" if many or axes is grid[0] else "")
        return as_png(figure)


def feature_map(run: RunFolder) -> bytes | None:
    """The sampled pixels of both domains on the two main directions of their features, coloured by class; prototypes as stars."""
    sample = run.features
    if sample is None or len(sample.features) < 3 or sample.features.shape[1] < 2:
        return None
    sections = [row.section for row in catalog.with_role("result")]
    unit = next((value for name in sections if (value := run.setting(name, "normalize")) is not None), True)
    points, prototypes = _plane(sample.features, sample.prototypes, unit=unit)
    colours = np.array([*run.palette, (203, 210, 217)]) / 255
    labels = np.where((sample.labels >= 0) & (sample.labels < len(run.palette)), sample.labels, len(run.palette))
    names = plot_names(run.classes)
    with drawing(10.6, 4.9, run.classes) as figure:
        grid = figure.subplots(1, 2, sharex=True, sharey=True)
        for domain, (axes, title) in enumerate(zip(grid, ("source", "target"), strict=True)):
            own, other = sample.domain == domain, sample.domain != domain
            axes.scatter(*points[other].T, s=5, c="#eceff2", linewidths=0)
            axes.scatter(*points[own].T, s=8, c=colours[labels[own]], linewidths=0, alpha=0.75)
            for index in np.flatnonzero(np.linalg.norm(sample.prototypes, axis=1) > 1e-6):
                if index < len(run.palette):
                    axes.scatter(
                        *prototypes[index],
                        marker="*",
                        s=210,
                        color=colours[index],
                        edgecolors=INK,
                        linewidths=0.9,
                        zorder=5,
                    )
            axes.set_title(title)
            axes.tick_params(labelbottom=False, labelleft=False, length=0)  # directions have no unit
            axes.grid(False)
        present = [index for index in range(len(run.palette)) if (labels == index).any()]
        handles = [
            Line2D([], [], marker="o", linestyle="", color=colours[index], label=names[index]) for index in present
        ]
        handles.append(Line2D([], [], marker="*", linestyle="", ms=11, mfc="white", mec=INK, label="prototype"))
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(len(handles), 10),
            handletextpad=0.1,
            columnspacing=1.2,
        )
        return as_png(figure)


def _plane(features: np.ndarray, prototypes: np.ndarray, *, unit: bool) -> tuple[np.ndarray, np.ndarray]:
    """Principal component analysis of the features (of unit length, as the loss sees them): coordinates of features and prototypes."""
    if unit:
        features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    mean = features.mean(0)
    centred = (features - mean).astype(np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred)
    axes = directions[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), range(2)])  # an eigenvector's sign is arbitrary: fix it
    return centred @ axes, (prototypes - mean) @ axes
