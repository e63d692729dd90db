"""`spcl-fast cross-validate`: how good a recipe is on the target where every label that there is would be learned from.

One run per fold leaves a part of the images of target.labelled out and is evaluated on it (target.fold). Over all folds every labelled
image is predicted once, by nets that never learned from its label: the confusions of a net are summed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import catalog, distributed
from ..config import Config
from ..config.fold import Fold
from ..data import ClassSet
from ..data.left_out import counted
from ..errors import CheckpointError, ConfigError, DataError
from ..runs import layout
from ..runs.folder import Run
from ..train.evaluate import Scores
from ..train.signals import stop_requests
from .domains import Domains
from .run import run_stages
from .summary import figures_of
from .training import Forecast


def folds_of(config: Config, count: int) -> list[Config]:
    """The settings of the run of each fold. Raises ConfigError where there is nothing to leave out, nothing to evaluate, or more folds than
    labelled images.
    """
    if config.target.labelled is None:
        raise ConfigError(
            "target.labelled: got null, and cross-validate leaves a part of the images that it names out of training, one part after the "
            "other: give --target.labelled, such as a file with the name of one image per line"
        )
    if config.target.fold is not None:
        raise ConfigError(
            f"target.fold: got {config.target.fold}, and cross-validate does every fold in a run of its own: leave it out"
        )
    if not _nets(config):
        raise ConfigError(
            f"stages: got {', '.join(config.stages)}, and none of them trains a net: there is nothing to evaluate. "
            f"Add one of {', '.join(catalog.names(catalog.trained()))}."
        )
    target = [dataclasses.replace(config.target, fold=str(Fold(part, count))) for part in range(1, count + 1)]
    return [
        dataclasses.replace(config, name=layout.name_of_fold(config.name, part), target=one)
        for part, one in enumerate(target, start=1)
    ]


def cross_validate(
    config: Config,
    count: int,
    *,
    forecast: Forecast | None = None,
    redo: Sequence[str] = (),
    fork_of: Path | None = None,
    say: Callable[[str], None] = print,
    after: Callable[[Path], None] = lambda run: None,
) -> dict[str, Any]:
    """Do the runs of all folds one after another, what is complete being skipped. -> what RUNS_DIR/NAME_cross_validation.json holds.

    What does not depend on the fold, such as source-only, is done in the first run and taken over by the others. fork_of: a run that the
    first one takes such stages over from. redo, forecast: as run_stages has them. after: is given each run's folder once it is finished.
    """
    configs = folds_of(config, count)
    held_out = Domains(configs[0]).held_out  # refuses more folds than images before any work
    assert held_out is not None
    first = layout.folder_of(configs[0])
    with distributed.session(config.loop.device), stop_requests() as stop:
        for part, one in enumerate(configs, start=1):
            stop.raise_if_requested(f"cross-validating, before fold {part} of {count}")
            if distributed.is_main():
                say(f"fold {part} of {count}: {layout.folder_of(one)}")
            run_stages(one, forecast=forecast, redo=redo, fork_of=fork_of if part == 1 else first)
            if distributed.is_main():
                after(layout.folder_of(one))
        return pooled(config, configs) if distributed.is_main() else {}


def pooled(config: Config, configs: Sequence[Config]) -> dict[str, Any]:
    """By net the figures over all labelled images, from what the runs of the folds keep, and those of each fold."""
    domains = [Domains(one) for one in configs]
    named, classes = domains[0].named_target, domains[0].classes
    assert named is not None
    held_out = [sorted(() if one.held_out is None else one.held_out.names) for one in domains]
    nets: dict[str, Any] = {}
    for row in _nets(config):
        found = [_evaluation(one, row, names) for one, names in zip(configs, held_out, strict=True)]
        assert row.net is not None
        nets[row.net] = _over_folds(classes, found)
    return {
        "classes": list(classes.names),
        **nets,
        "labelled_images": len(named),
        "learned_from": sorted({len(named) - len(names) for names in held_out}),
        "seed": config.seed,
        "selection": config.evaluate.selection,
        "folds": [
            {"run": str(layout.folder_of(one)), "fold": one.target.fold, "images": names}
            for one, names in zip(configs, held_out, strict=True)
        ],
    }


def _nets(config: Config) -> list[catalog.Stage]:
    return [row for row in catalog.trained() if row.name in config.stages]


def _evaluation(config: Config, row: catalog.Stage, names: list[str]) -> dict[str, Any]:
    """evaluation.json of a stage. Raises CheckpointError where it is not of these images."""
    run, file = Run(layout.folder_of(config)), layout.of_stage(row.name, layout.EVALUATION)
    found = run.read_json(file)
    if not isinstance(found, dict) or found.get(layout.EVALUATED, {}).get(layout.HELD_OUT_NAMES) != names:
        raise CheckpointError(
            f"{run.path(file)} has no figures of the {counted(len(names), 'image')} that fold {config.target.fold} leaves out. "
            f"Remove {run.path(row.name)} to have the stage done again."
        )
    return found


def _over_folds(classes: ClassSet, evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    confusions = [np.asarray(one["confusion"], dtype=np.int64) for one in evaluations]
    scores = Scores(classes, np.sum(confusions, axis=0)).as_json()
    by_fold = [one["miou"] for one in evaluations]
    known = [value for value in by_fold if value is not None]
    if not known:
        raise DataError(
            "no pixel of the images of target.labelled is labelled: look at their labels (spcl-fast check-data --labels)"
        )
    spread = statistics.stdev(known) if len(known) > 1 else None
    return {
        **(figures_of(scores) or {}),
        "confusion": scores["confusion"],
        layout.BY_FOLD: by_fold,
        layout.SPREAD: spread,
    }


def write_cross_validation(config: Config, record: dict[str, Any], page: str) -> tuple[Path, Path]:
    """The figures as JSON and as Markdown, next to the runs. -> the two files."""
    runs = Run(Path(config.runs_dir))
    names = [f"{config.name}_{ending}" for ending in layout.CROSS_VALIDATION]
    runs.write_json(names[0], record)
    runs.write_text(names[1], page)
    return runs.path(names[0]), runs.path(names[1])
