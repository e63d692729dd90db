"""report.html: one file that needs nothing else, written from what a run folder holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from .. import catalog
from ..data.left_out import counted
from ..errors import CheckpointError
from ..runs import layout
from ..runs.reading import RunFolder, number, read_run
from . import memory_rows as memory
from . import pictures, plots
from .comparison import Comparison, compare
from .findings import findings_of, labelled_count
from .label_curve import section
from .lettering import undrawn
from .tables import left_out_of

SELECTION = {
    "last": "Every net is the last one of its stage. No label was used to choose it.",
    "source_val": "Every net is the one that did best on the source's validation images. No target label was used to choose it.",
    "target_val": "Every net was chosen by its score on target labels: this is not the score of unsupervised adaptation.",
}


@dataclass(frozen=True)
class Headline:
    title: str
    value: str
    note: str = ""
    tone: str = ""


def write_report(
    run_folder: Path | str, others: Sequence[Path | str] = (), say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write <run_folder>/report.html and return its path.

    Reads only that folder. Parts that are missing or damaged are named in the page; a run that stopped half-way has a report too. The
    page makes no request: pictures are inside it. Raises CheckpointError if the folder is not there or cannot be written.

    others: folders of runs of the same data, for a curve of mIoU against the number of labelled target images. What was compared and
    what was left out, with the reason, stands in the page and goes to `say`, a line each.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a run folder: there is no such folder. Expected one such as runs/demo.")
    run = read_run(folder)
    found = compare(run, [Path(other) for other in others]) if others else None
    page = render(run, found)
    path = folder / layout.REPORT
    part = path.with_name(f".{layout.REPORT}.{os.getpid()}.part")
    try:
        part.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}. Make room or change its permissions, then `spcl-fast report {folder}`."
        ) from error
    for line in found.lines() if found else ():
        say(line)
    return path


def environment() -> jinja2.Environment:
    """The package's templates; whatever comes from a file is text in them."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("spcl_fast.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["percent"] = lambda value: "–" if value is None else f"{value:.1f}"
    found.filters["share"] = lambda value: "–" if value is None else f"{100 * value:.1f}%"
    return found


def render(run: RunFolder, compared: Comparison | None = None) -> str:
    figures = {
        name: _drawn(run, draw)
        for name, draw in {
            "class_scores": plots.class_scores,
            "curves": plots.curves,
            "class_shares": plots.class_shares,
            "prototype_norms": plots.prototype_norms,
            "confusion": plots.confusion,
            "feature_map": plots.feature_map,
        }.items()
    }
    samples = pictures.samples(run)  # before `missing` is shown: a damaged picture adds a line to it
    return (
        environment()
        .get_template("template.html")
        .render(
            title=str(run.setting("name", default=run.folder.resolve().name)),
            subtitle=_subtitle(run),
            cards=_cards(run),
            findings=findings_of(run),
            table=_table(run),
            legend=list(zip(run.classes, (f"rgb{colour}" for colour in run.palette), strict=True)),
            undrawn=undrawn(run.classes),
            labels=section(compared) if compared else None,
            samples=samples,
            figures=figures,
            pseudo_labels=_pseudo_labels(run),
            stages=_stages(run),
            memory=memory.ledger(run),
            machine=_machine(run),
            images=evaluated_images(run),
            left_out=run.setting("target", "fold") is not None,
            selection=SELECTION.get(str(run.summary.get("selection")), "") + _few_labels(run),
            settings=run.settings,
            missing=run.missing,
            baseline=catalog.title(run.baseline) if run.baseline else None,
            final=catalog.title(run.final) if run.final else None,
            is_head=run.is_head,
        )
    )


def evaluated_images(run: RunFolder) -> str:
    """Which images the figures are of."""
    fold = run.setting("target", "fold")
    counts = left_out_of(run.summary) or (f"labelled target images left out of training (fold {fold})" if fold else "")
    return counts or "the target's labelled validation images"


def _few_labels(run: RunFolder) -> str:
    count = labelled_count(run)
    if not count:
        return ""
    without = " and ".join(row.title for row in catalog.trained() if not row.few_labels)
    return f" All nets but {without} learned from {counted(count, 'labelled target image')}, too."


def _drawn(run: RunFolder, draw: Any) -> str | None:
    try:
        data = draw(run)
    except Exception as error:  # odd values in a file must cost one plot, not the report
        run.missing.append(f"the plot {draw.__name__} could not be drawn: {type(error).__name__}: {error}")
        return None
    return None if data is None else pictures.data_uri(data, "png")


def _subtitle(run: RunFolder) -> str:
    parts = []
    source, target = (run.setting(side, "root") or run.setting(side, "dataset") for side in ("source", "target"))
    if source and target:
        parts.append(f"{_short(source)} → {_short(target)}")
    if run.setting("model", "name"):
        parts.append(str(run.setting("model", "name")))
    if run.classes:
        parts.append(f"{len(run.classes)} classes")
    seed = run.summary.get("seed", run.setting("seed"))
    if seed is not None:
        parts.append(f"seed {seed}")
    return " · ".join(parts)


def _short(root: Any) -> str:
    return Path(str(root)).name or str(root)


def _cards(run: RunFolder) -> list[Headline]:
    cards = []
    final, final_title = (run.evaluations[run.final], catalog.title(run.final)) if run.final else (None, "")
    if run.baseline:
        cards.append(
            Headline(catalog.title(run.baseline), f"{run.evaluations[run.baseline].miou:.1f}", "mIoU on target, %")
        )
    if final is not None:
        cards.append(Headline(f"final net, {final_title}", f"{final.miou:.1f}", "mIoU on target, %", "final"))
    if final is not None and run.baseline:
        cards.append(
            _gain("gain", final.miou - run.evaluations[run.baseline].miou, f"points over {catalog.title(run.baseline)}")
        )
    for control in catalog.with_role("matched"):
        if final is not None and control.name in run.evaluations:
            gain = final.miou - run.evaluations[control.name].miou
            how = (
                "learned from the same labels, without adaptation"
                if labelled_count(run)
                else "trained on without the target"
            )
            note = f"points; the {control.title} {how}"
            cards.append(_gain(f"gain over the {control.title}", gain, note))
    gap = number(run.summary.get("gap_closed"))
    if gap is not None:
        bounds = [row for row in catalog.with_role("bound") if row.name in run.evaluations]
        note = [f"of the way to the {row.title}'s {run.evaluations[row.name].miou:.1f}" for row in bounds]
        cards.append(Headline("gap closed", f"{100 * gap:.0f}%", ", ".join(note)))
    return cards


def _gain(title: str, value: float, note: str) -> Headline:
    return Headline(title, f"{value:+.1f}", note, "good" if value > 0 else "bad")


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _table(run: RunFolder) -> dict[str, Any] | None:
    """Classes in rows, nets in columns; the last column is the gain of the final net over the baseline."""
    stages = plots.evaluated(run)
    if not stages:
        return None
    rows: list[tuple[str, str | None, list[float | None]]] = [
        (name, f"rgb{colour}", [run.evaluations[stage].iou.get(name) for stage in stages])
        for name, colour in zip(run.classes, run.palette, strict=True)
    ]
    rows.append(("mIoU", None, [run.evaluations[stage].miou for stage in stages]))
    gains: list[float | None] = [None] * len(rows)
    if run.baseline and run.final:
        before, after = stages.index(run.baseline), stages.index(run.final)
        gains = [_difference(values[before], values[after]) for _, _, values in rows]
    shares = run.evaluations[run.final or stages[-1]]
    return {
        "header": [catalog.title(stage) for stage in stages],
        "final": stages.index(run.final) if run.final else None,
        "rows": [
            {
                "name": name,
                "colour": colour,
                "values": values,
                "gain": gain,
                "predicted": shares.predicted_share.get(name),
                "true": shares.true_share.get(name),
            }
            for (name, colour, values), gain in zip(rows, gains, strict=True)
        ],
        "has_gain": any(gain is not None for gain in gains),
        "has_shares": bool(shares.predicted_share and shares.true_share),
        "shares_of": catalog.title(run.final or stages[-1]),
    }


def _pseudo_labels(run: RunFolder) -> list[dict[str, Any]]:
    """By class and round: threshold, share of the pixels predicted so, share of those that kept their label."""
    rounds = []
    for stage, record in run.thresholds.items():
        predicted = {name: number(record["predicted_pixels"].get(name)) or 0.0 for name in run.classes}
        kept = {name: number(record["kept_pixels"].get(name)) or 0.0 for name in run.classes}
        total = sum(predicted.values())
        rounds.append(
            {
                "title": catalog.title(stage),
                "rows": [
                    {
                        "threshold": number(record["thresholds"].get(name)),
                        "predicted": predicted[name] / total if total else None,
                        "kept": kept[name] / predicted[name] if predicted[name] else None,
                    }
                    for name in run.classes
                ],
                "kept": sum(kept.values()) / total if total else None,
            }
        )
    return rounds


def _stages(run: RunFolder) -> list[dict[str, str]]:
    """Iterations, seconds, speed, waiting and peak memory of each stage."""
    rows = []
    trained = catalog.names(catalog.with_nets())
    for stage in (*trained, *(stage for stage in run.metrics if stage not in trained)):
        records, done = run.metrics.get(stage, []), run.done.get(stage, {})
        if not records and not done:
            continue
        last = records[-1] if records else {}
        seconds = number(done.get("seconds")) or number(last.get("seconds"))
        peak = number(done.get("peak_memory_bytes")) or number(last.get("peak_memory_bytes"))
        rows.append(
            {
                "name": catalog.title(stage),
                "iterations": str(int(number(done.get("step")) or last.get("step") or 0)),
                "seconds": "–" if seconds is None else _duration(seconds),
                "speed": _mean(records, "images_per_s", lambda value: f"{value:.1f}"),
                "wait": _mean(records, "data_wait", lambda value: f"{100 * value:.0f}%"),
                "peak": "–" if peak is None else f"{peak / 2**20:,.0f} MiB",
            }
        )
    return rows


def _mean(records: list[dict[str, Any]], key: str, show: Any) -> str:
    values = [value for value in (number(record.get(key)) for record in records) if value is not None]
    return show(sum(values) / len(values)) if values else "–"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _machine(run: RunFolder) -> list[tuple[str, str]]:
    machine = run.summary.get("machine")
    return [(str(key), str(value)) for key, value in machine.items()] if isinstance(machine, dict) else []
