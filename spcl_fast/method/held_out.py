"""No net may have learned from the labels that target.fold leaves out: none of the run's folder, none that its settings start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import catalog
from ..config.load import all_settings
from ..errors import CheckpointError, ConfigError
from ..runs import layout
from ..runs.identity import CONTENT, flat_settings, settings_difference
from .context import Context
from .domains import Domains

# of an identity: what decides which labels a stage learned from
_LABELS = ("target.labelled", "target.fold", f"{CONTENT}.target.labelled", "run_seed")


def names_of(file: Path) -> list[str]:
    """A run's list of images, such as held_out.txt; none where it has no such file."""
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def write_names(context: Context, *, learned: bool) -> None:
    """Into the run's folder the images that are left out and, if any stage learns from them, those whose labels are used."""
    lists = {layout.HELD_OUT: context.domains.held_out}
    if learned:
        lists[layout.LABELLED] = context.domains.labelled_target
    for file, dataset in lists.items():
        if dataset is not None:
            context.run.write_text(file, "".join(f"{name}\n" for name in dataset.names))
        elif context.run.writes:
            context.run.path(file).unlink(missing_ok=True)  # of a fold before, which learned from none of these labels


def fold_record(domains: Domains) -> dict[str, Any] | None:
    """For summary.json: which images the figures are of, where target.fold says so."""
    if domains.held_out is None or domains.named_target is None:
        return None
    return {
        "fold": domains.config.target.fold,
        "images": len(domains.held_out),
        "labelled_images": len(domains.named_target),
    }


def check_one_fold(context: Context, row: catalog.Stage, stored: dict[str, Any]) -> None:
    """Raise CheckpointError where a stage of the run's folder, begun with the settings `stored`, learned from other labels: a later one
    that starts from it would be evaluated on what it learned, and the figures of a folder would be of different images.
    """
    folds = context.config.target.fold, stored.get("target.fold")
    if not any(catalog.depends_on_labelled(row, fold) and fold is not None for fold in folds):
        return
    now = flat_settings(context.identity(row))
    difference = settings_difference(*({key: all_[key] for key in _LABELS if key in all_} for all_ in (stored, now)))
    if difference:
        raise CheckpointError(
            f"{context.run.folder} has {row.name}, which learned from other labels ({difference}). All stages of a folder leave out the "
            f"same images: set it back, do the stage again with --redo {row.name}, or give this run another name."
        )


def check_given_files(context: Context, rows: Sequence[catalog.Stage]) -> None:
    """Raise ConfigError where what a setting names (model.weights, pseudo_label.folder, ...) lies in a run that learned from a label that
    is left out here. Of files that lie in no run nothing is known.
    """
    if context.domains.held_out is None:
        return
    sections = {"model", *(row.section for row in rows)}
    for key, setting in all_settings().items():
        value = context.setting(key) if setting.about.path and key.partition(".")[0] in sections else None
        run = None if value is None else layout.run_of(Path(value))
        if run is None or value is None or run.resolve() == context.run.folder.resolve():
            continue
        met = _learned_in(run, Path(value), context.domains.held_out.names)
        if met:
            raise ConfigError(
                f"{key}: {value} lies in {run}, which learned from the label of {met[0]!r}, and target.fold "
                f"{context.config.target.fold} leaves that image out: it would be evaluated on what it learned. Take a file of a run "
                "without these labels; if those are other images of the same names, move the file out of that folder."
            )


def _learned_in(run: Path, path: Path, names: Sequence[str]) -> list[str]:
    """Of the names those whose labels the stage in whose folder `path` lies, or any stage of the run, learned from."""
    inside = path.resolve().relative_to(run.resolve()).parts
    row = next((row for row in catalog.STAGES if inside and row.name == inside[0]), None)
    if row is not None and row.role == "bound":
        spared = set(names_of(run / layout.HELD_OUT))
        return [name for name in names if name not in spared]
    if row is not None and not row.few_labels:
        return []
    learned = set(names_of(run / layout.LABELLED))
    return [name for name in names if name in learned]


def check_left_out_by(path: Path, domains: Domains) -> None:
    """Before weights are evaluated on what target.fold leaves out: raise ConfigError unless the run that they lie in left out the same."""
    if domains.held_out is None:
        return
    run = layout.run_of(path)
    if run is None or set(names_of(run / layout.HELD_OUT)) != set(domains.held_out.names):
        raise ConfigError(
            f"target.fold: got {domains.config.target.fold}, and nothing shows that {path} learned from none of the labels that it leaves "
            f"out. Expected weights in the folder of a run with the same target.fold (its {layout.HELD_OUT} lists the images); without "
            "target.fold, target.val_split is evaluated."
        )
