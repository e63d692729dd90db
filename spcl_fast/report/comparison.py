"""Runs of the same data next to each other: which of them compare, why the others do not, and what differs between those that do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import catalog
from ..config import Config
from ..data.left_out import counted
from ..runs import layout
from ..runs.identity import CONTENT, flat_settings, settings_difference
from ..runs.reading import Evaluation, RunFolder, read_run
from .tables import left_out_of

_LABELLED = "target.labelled"
# settings in which runs of one curve may differ: what it is about, what makes a run another draw of the same, and where it lies
_FREE = {_LABELLED, f"{CONTENT}.{_LABELLED}", "seed", "name", "runs_dir", "stages"}
_TARGET = ("target.dataset", "target.root", f"{CONTENT}.target.root")
_WAYS = ("tta", "window", "window_stride", "images")  # of evaluate: how, and how many of them


class Unfit(Exception):
    """Why a run is left out of a curve, for the reader."""


@dataclass(frozen=True)
class Row:
    """One run of a curve."""

    run: RunFolder
    name: str
    count: int  # labelled target images that it learned from
    other_settings: bool = False  # it differs from the page's run in more than a curve's runs may

    def miou(self, stage: str | None) -> float | None:
        evaluation = self.run.evaluations.get(stage or "")
        return None if evaluation is None else evaluation.miou

    @property
    def gain(self) -> float | None:
        """The final net over the control."""
        before, after = self.miou(control_of(self.run)), self.miou(self.run.final)
        return None if before is None or after is None else after - before


@dataclass(frozen=True)
class Comparison:
    """The page's own run is one of the rows, or it is the one that is left out and there are none."""

    own: str
    rows: list[Row]  # by number of labels, then by name
    left_out: list[tuple[str, str]]  # run, why
    differences: list[tuple[list[str], str]]  # runs, what they have otherwise than the page's own

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        if self.rows:
            counts = ", ".join(map(str, dict.fromkeys(row.count for row in self.rows)))
            yield f"curve: {counted(len(self.rows), 'run')} with {counts} labelled target images"
        for name, why in self.left_out:
            yield f"left out of the curve: {name}: {why}"
        for names, what in self.differences:
            yield f"warning: not only labels and seed differ from {self.own}: {', '.join(names)}: {what}"


def control_of(run: RunFolder) -> str | None:
    """The stage of the net that learned from the same labels without adaptation."""
    return next((row.name for row in catalog.with_role("matched") if row.name in run.evaluations), None)


def compare(own: RunFolder, folders: Sequence[Path]) -> Comparison:
    """The run of a page and those of `folders` that compare with it. Nothing but these folders is read.

    `own` may be among them; of a run that is there twice, by path or as a copy, one counts.
    """
    names, left_out = _names([own.folder, *folders]), []
    title = names[own.folder]
    try:
        rows = [_row(own, own, title)]
    except Unfit as why:
        return Comparison(title, [], [(title, f"{why}. Nothing was compared with it")], [])
    places, twins = {own.folder.resolve()}, {_twin(own): title}
    for folder in folders:
        name, place = names[folder], folder.resolve()
        if place == own.folder.resolve():
            continue
        try:
            if place in places:
                raise Unfit("given twice; it counts once")
            places.add(place)
            row = _row(_read(folder), own, name)
            twin = _twin(row.run)
            if twin and twin in twins:
                raise Unfit(f"the same stages with the same settings and seed as {twins[twin]}; they count once")
            twins[twin] = name
            rows.append(row)
        except Unfit as why:
            left_out.append((name, str(why)))
    rows, differences = _marked(sorted(rows, key=lambda row: (row.count, row.name)), own)
    return Comparison(title, rows, left_out, differences)


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """A folder's last part where that is enough to know it."""
    last = {folder: folder.resolve().name for folder in folders}
    places = {(name, folder.resolve()) for folder, name in last.items()}
    shared = [name for name, _ in places]
    return {folder: name if shared.count(name) == 1 else str(folder) for folder, name in last.items()}


def _read(folder: Path) -> RunFolder:
    if not any((folder / name).is_file() for name in (layout.CONFIG, layout.SUMMARY)):
        raise Unfit(f"no run folder: it has neither {layout.CONFIG} nor {layout.SUMMARY}")
    return read_run(folder)


def _row(run: RunFolder, own: RunFolder, name: str) -> Row:
    """Raises Unfit."""
    _check_whole(run)
    row = Row(run, name, _label_count(run))
    _check_same_classes(run, own)
    _check_same_target(run, own)
    _check_same_images(run, own)
    return row


# ---- a run by itself -------------------------------------------------------------------------------------------------


def _shown(run: RunFolder) -> list[str]:
    """The stages whose nets a curve is of."""
    return [stage for stage in (control_of(run), run.final) if stage is not None]


def _check_whole(run: RunFolder) -> None:
    needed = [layout.SUMMARY, layout.CLASSES]
    needed += [
        layout.of_stage(row.name, file) for row in catalog.with_nets() for file in (layout.EVALUATION, layout.DONE)
    ]
    damaged = [run.damaged[name] for name in needed if name in run.damaged]
    if damaged:
        raise Unfit("; ".join(damaged))
    if not run.summary:
        raise Unfit(f"unfinished: it has no {layout.SUMMARY}")
    if not run.parsed_settings:
        raise Unfit(f"{layout.CONFIG} is not there or damaged, so nothing says what else differs")
    trained = catalog.names(catalog.with_nets())
    begun = [stage for stage in trained if run.done and stage in run.metrics and stage not in run.done]
    if begun:
        raise Unfit(f"unfinished: {begun[0]} stopped after step {run.metrics[begun[0]][-1]['step']}")
    if not _shown(run):
        nets = (*catalog.with_role("matched"), *catalog.with_role("result"))
        raise Unfit(f"no mIoU of any of {', '.join(row.title for row in nets)}")


def _label_count(run: RunFolder) -> int:
    """Of how many target images the nets of a curve learned the labels. Raises Unfit where that is not known."""
    named = run.setting(*_LABELLED.split("."))
    for stage in _shown(run):
        learned = _identity(run, stage)
        if _LABELLED in learned and str(learned[_LABELLED]) != str(named):
            raise Unfit(
                f"its {catalog.title(stage)} net learned with {_LABELLED} {learned[_LABELLED]}, and its settings say {named} since"
            )
    if named is None:
        if run.is_head:
            raise Unfit(f"a head that learned from every label of its images, as {_LABELLED} is null")
        return 0
    count = run.summary.get(layout.LABELLED_COUNT)
    if isinstance(count, int) and not isinstance(count, bool):
        return count
    try:
        names = (run.folder / layout.LABELLED).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        names = []
    if not names:
        raise Unfit(
            f"{_LABELLED} is {named}, and neither {layout.SUMMARY} nor {layout.LABELLED} says how many images that are"
        )
    return len(names)


def _identity(run: RunFolder, stage: str) -> dict[str, Any]:
    """What a finished stage says that it depends on."""
    settings = run.done.get(stage, {}).get("settings")
    return settings if isinstance(settings, dict) else {}


def _twin(run: RunFolder) -> tuple[str, ...]:
    """Alike for runs whose nets were made alike, seed and labels included; empty where nothing is known."""
    hashes = [run.done.get(stage, {}).get("settings_sha256") for stage in _shown(run)]
    return tuple(map(str, hashes)) if all(hashes) else ()


# ---- a run next to that of the page ------------------------------------------------------------------------------------


def _check_same_classes(run: RunFolder, own: RunFolder) -> None:
    if run.classes != own.classes:
        more, less = (
            [name for name in a if name not in b] for a, b in ((run.classes, own.classes), (own.classes, run.classes))
        )
        parts = [f"{word} {', '.join(names)}" for word, names in (("with", more), ("without", less)) if names]
        raise Unfit(f"other classes ({' and '.join(parts) or 'in another order'})")


def _check_same_target(run: RunFolder, own: RunFolder) -> None:
    difference = _difference(run, own, _TARGET)
    if difference:
        raise Unfit(f"another target ({difference})")


def _check_same_images(run: RunFolder, own: RunFolder) -> None:
    """Raise Unfit where the nets of two runs, or of one, were not evaluated on the same images in the same way, as far as is known."""
    folds = [one.setting("target", "fold") for one in (own, run)]
    difference = _difference(run, own, ["target.fold"] if any(folds) else ["target.val_split"])
    if difference:
        raise Unfit(f"evaluated on other images ({difference})")
    parts = [left_out_of(one.summary) for one in (own, run)]
    if parts[0] != parts[1]:
        raise Unfit(f"evaluated on other images ({parts[0]} -> {parts[1]})")
    if _held_out(run) != _held_out(own):
        both = len(set(_held_out(run)) & set(_held_out(own)))
        raise Unfit(
            f"evaluated on other images ({counted(len(_held_out(run)), 'image')} left out of training, {both} of them among the "
            f"{len(_held_out(own))} of {own.folder.name})"
        )
    evaluations = [one.evaluations[stage] for one in (own, run) for stage in _shown(one)]
    records = [_without_names(evaluation.evaluated) for evaluation in evaluations if evaluation.evaluated is not None]
    difference = next((found for one in records[1:] if (found := settings_difference(records[0], one))), "")
    if not difference and len(records) < len(evaluations):
        difference = _difference(run, own, [f"evaluate.{name}" for name in _WAYS])
    if difference:
        raise Unfit(f"evaluated on other images or in another way ({difference})")
    _check_same_pixels(evaluations)


def _check_same_pixels(evaluations: Sequence[Evaluation]) -> None:
    """What the true classes of the evaluated pixels are does not depend on the net: this tells generated scenes apart, too."""
    true = [evaluation.confusion.sum(1) for evaluation in evaluations if evaluation.confusion is not None]
    if any(not np.array_equal(true[0], other) for other in true[1:]):
        raise Unfit("evaluated on other images (the labelled pixels of each class are not as many)")


def _without_names(evaluated: dict[str, Any]) -> dict[str, Any]:
    return flat_settings({key: value for key, value in evaluated.items() if key != layout.HELD_OUT_NAMES})


def _held_out(run: RunFolder) -> list[str]:
    """Names of the images that target.fold left out, where the run has one."""
    for stage in _shown(run):
        names = (run.evaluations[stage].evaluated or {}).get(layout.HELD_OUT_NAMES)
        if isinstance(names, list):
            return sorted(map(str, names))
    return []


# ---- what else differs -----------------------------------------------------------------------------------------------


def _marked(rows: Sequence[Row], own: RunFolder) -> tuple[list[Row], list[tuple[list[str], str]]]:
    """The rows, those of other settings marked, and what these are; runs of the same ones together."""
    texts: dict[str, list[str]] = {}
    marked = []
    for row in rows:
        text = "; ".join(filter(None, (_other_stages(row.run, own), _difference(row.run, own))))
        marked.append(replace(row, other_settings=bool(text)))
        if text:
            texts.setdefault(text, []).append(row.name)
    return marked, [(names, text) for text, names in texts.items()]


def _other_stages(run: RunFolder, own: RunFolder) -> str:
    """What was done, not what `stages` says: a stage may be added by its own command. Nothing starts from a net that bounds the others."""
    bounds = catalog.names(catalog.with_role("bound"))
    done = [
        [
            stage
            for stage in catalog.names(catalog.STAGES)
            if stage in (*one.done, *one.evaluations) and stage not in bounds
        ]
        for one in (run, own)
    ]
    more, less = ([stage for stage in a if stage not in b] for a, b in (done, done[::-1]))
    parts = [f"{word} {', '.join(stages)}" for word, stages in (("with", more), ("without", less)) if stages]
    return f"stages {' and '.join(parts)}" if parts else ""


def _difference(run: RunFolder, own: RunFolder, keys: Sequence[str] | None = None) -> str:
    """`adapt.lr: own value -> the run's` of these settings; None: of all in which runs of one curve should be alike."""
    flat = []
    for one in (own, run):
        every = _settings(one)
        flat.append({key: value for key, value in every.items() if (key in keys if keys else key not in _FREE)})
    return settings_difference(*flat)


def _settings(run: RunFolder) -> dict[str, Any]:
    """Every setting, those that a run of another version lacks at their defaults, and what lies where a path of its data or net leads."""
    content = {
        key: value
        for stage in run.done
        for key, value in _identity(run, stage).items()
        if key.startswith(tuple(f"{CONTENT}.{section}." for section in ("source", "target", "model")))
    }
    return {**flat_settings(Config()), **flat_settings(run.parsed_settings), **content}
