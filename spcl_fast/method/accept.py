"""Before the first step: what a run's folder holds must fit the settings, and every stage needs the ones that it starts from.

A refused setting leaves the folder as it is; `redo` removes what was made with others; `fork` takes finished stages over from a run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import catalog, distributed
from ..config import Config
from ..config.load import all_settings, with_values
from ..errors import CheckpointError, ConfigError
from ..runs import layout
from ..runs.checkpoint import CheckpointStore
from ..runs.durable import remove_folder
from ..runs.folder import Run
from ..runs.identity import CONTENT, INPUTS, flat_settings, settings_difference
from ..train.resume import identity_of
from . import prototypes
from .context import Context
from .held_out import check_given_files, check_one_fold


def accept(context: Context, rows: Sequence[catalog.Stage], redo: Sequence[str] = ()) -> None:
    """Raise CheckpointError, on every process, where a stage was begun with other settings or lacks one that it starts from.

    redo: stages to do again where their settings changed, with all that started from them.
    """
    problem = None
    if distributed.is_main():
        try:
            _accept(context, rows, redo)
        except (CheckpointError, ConfigError) as error:
            problem = error
    problem = distributed.broadcast_object(problem)
    if problem is not None:
        raise problem


def _accept(context: Context, rows: Sequence[catalog.Stage], redo: Sequence[str]) -> None:
    run, coming = context.run, [row.name for row in rows]
    for row in rows:
        for name in _inputs(context, row, coming):
            if name not in (*coming, *redo):  # what is about to run, or to be removed, is compared whole
                _check_same_net(context, catalog.find(catalog.STAGES, name))
    removed = [row for row in catalog.STAGES if row.name in redo and _redo(context, row)]
    for row in catalog.STAGES:
        started_from = {key.partition(".")[2] for key in _stored(run, row) or () if key.startswith(f"{INPUTS}.")}
        gone = [one.name for one in removed if one.name in started_from]
        if row not in removed and gone:
            run.say(f"{row.name}: to be done again, as it started from {gone[0]}")
            _remove(run, row)
            removed.append(row)
    for row in rows:
        for name, there in _inputs(context, row, coming).items():
            if not there:
                raise CheckpointError(_not_there(name, row, run, alone=len(rows) == 1))
        _refuse(run, row, difference_of(context, row), f"with --redo {row.name}")
        _check_class_names(context, row)
    for row in catalog.STAGES:
        stored = _stored(run, row)
        if stored is not None:
            check_one_fold(context, row, stored)
    check_given_files(context, rows)


def _inputs(context: Context, row: catalog.Stage, coming: Sequence[str]) -> dict[str, bool]:
    """The stages that this one starts from, and whether each is there: finished, or among those that come before it."""
    there = {one.name for one in catalog.STAGES if context.run.done(one.name) is not None}
    there |= {*coming[: coming.index(row.name)]}
    return {name: name in there for name in catalog.inputs(row, lambda name: name in there, context.setting)}


def _check_same_net(context: Context, row: catalog.Stage) -> None:
    """Raise CheckpointError where a finished stage that another starts from is of a net with other settings, though its weights may load:
    the two would train different parts of it, or feed it otherwise.
    """
    _refuse(context.run, row, difference_of(context, row, "model"), f"first (`{_command(row)} --redo {row.name}`)")


def _refuse(run: Run, row: catalog.Stage, difference: str, again: str) -> None:
    if difference:
        raise CheckpointError(
            f"Stage {row.name} in {run.folder} was {'finished' if run.done(row.name) else 'begun'} with other settings "
            f"({difference}). Set them back, do it again {again}, or give this run another name "
            f"(--fork {run.folder} takes over the stages that stay the same)."
        )


def _command(row: catalog.Stage) -> str:
    number = catalog.rounds(row.command).index(row) + 1
    return f"spcl-fast {row.command}{f' --round {number}' if number > 1 else ''}"


def _check_class_names(context: Context, row: catalog.Stage) -> None:
    for name, setting in all_settings().items():
        if setting.about.classes and name.startswith(f"{row.section}.") and context.setting(name):
            try:
                context.classes.named(context.setting(name))
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from None


def _not_there(name: str, row: catalog.Stage, run: Run, *, alone: bool) -> str:
    how = f"`{_command(catalog.find(catalog.STAGES, name))}`" if alone else f"add {name} to the stages"
    return f"stage {name!r} is not finished in {run.folder}, and {row.name} starts from it: do it first ({how})."


def difference_of(context: Context, row: catalog.Stage, section: str = "") -> str:
    """What differs between the settings (those of one section, if it is named) and those that the stage was begun with; empty where
    nothing does or nothing is there.
    """
    stored = _stored(context.run, row)
    if stored is None:
        return ""
    now = whole_identity(context, row)
    if section:
        begins = (f"{section}.", f"{CONTENT}.{section}.")
        stored, now = ({key: value for key, value in all_.items() if key.startswith(begins)} for all_ in (stored, now))
    return settings_difference(stored, now)


def whole_identity(context: Context, row: catalog.Stage) -> dict[str, Any]:
    """As a stage's done.json and its checkpoints keep it."""
    identity = context.identity(row)
    if row.net is None:
        return flat_settings(identity)
    return identity_of(row.name, identity, context.settings(row).iterations, context.config.seed, context.config.loop)


def _stored(run: Run, row: catalog.Stage) -> dict[str, Any] | None:
    done = run.done(row.name)
    if done is not None:
        return done["settings"]
    for path in CheckpointStore(run.stage(row.name) / layout.CHECKPOINTS).paths():
        with contextlib.suppress(CheckpointError):  # a damaged one is what resuming passes over, too
            state = run.read_json(str(path.relative_to(run.folder) / layout.STATE))
            meta = state.get("meta") if isinstance(state, dict) else None
            if isinstance(meta, dict) and isinstance(meta.get("settings"), dict):
                return meta["settings"]
    return None


def as_ran(context: Context, rows: Sequence[catalog.Stage]) -> Config:
    """The run's settings, where the stages that the folder holds and that are not about to run keep those that they ran with."""
    known, values = all_settings(), {}
    sections = {row.section for row in rows}
    for row in catalog.STAGES:
        for key, value in (_stored(context.run, row) or {}).items() if row.section not in sections else ():
            name = f"{row.section}.{key.removeprefix(f'{row.name}.')}"
            if key.startswith(f"{row.name}.") and name in known:
                values[name] = known[name].read(value)
    return with_values(context.config, values)


# ---- doing stages again ----------------------------------------------------------------------------------------------


def _redo(context: Context, row: catalog.Stage) -> bool:
    """Remove the stage if it has other settings; a stage with the same ones would come out the same."""
    difference = difference_of(context, row)
    if not difference:
        return False
    context.run.say(f"{row.name}: to be done again ({difference})")
    _remove(context.run, row)
    return True


def _remove(run: Run, row: catalog.Stage) -> None:
    remove_folder(run.stage(row.name))
    run.forget_metrics_after(row.name, 0)
    for name in (layout.PROTOTYPES,) if row.name == prototypes.STAGE.name else (layout.FEATURES,):
        run.path(name).unlink(missing_ok=True)


# ---- taking finished stages over ---------------------------------------------------------------------------------------


def fork(context: Context, other: Path) -> None:
    """Take over from another run's folder the finished stages that these settings would make alike. Raises ConfigError for no run.

    Stages that the run's own folder has already stay as they are. Tensors are linked where the file system can.
    """
    run, old = context.run, Run(other)
    if not (other / layout.CONFIG).is_file():
        raise ConfigError(f"--fork {other}: expected the folder of a run, with {layout.CONFIG} in it")
    if other.resolve() == run.folder.resolve():
        raise ConfigError(f"--fork {other}: that is this run's own folder. Give the new run another name.")
    for row in catalog.STAGES:
        record = old.done(row.name)
        if (
            record is None
            or run.stage(row.name).exists()
            or any(run.done(name) is None for name in context.inputs(row))
        ):
            continue
        fold, theirs = context.config.target.fold, record["settings"].get("target.fold")
        if catalog.depends_on_labelled(row, fold) and None not in (fold, theirs) and fold != theirs:
            continue  # of another fold of a cross-validation: nobody expects it
        difference = settings_difference(record["settings"], whole_identity(context, row))
        if difference:
            run.say(f"{row.name}: not taken over from {other} ({difference})")
        else:
            _take_over(run, old, row)


def _take_over(run: Run, old: Run, row: catalog.Stage) -> None:
    part = run.path(f".{row.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(old.stage(row.name), part, copy_function=_link_or_copy)
    if row.name == prototypes.STAGE.name and old.path(layout.PROTOTYPES).is_file():
        shutil.copy2(old.path(layout.PROTOTYPES), run.path(layout.PROTOTYPES))
    for record in old.metrics(row.name):
        run.append_metrics(record)
    os.replace(part, run.stage(row.name))
    run.say(f"{row.name}: taken over from {old.folder}")


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith(".safetensors"):  # never written in place: a new one replaces it
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
