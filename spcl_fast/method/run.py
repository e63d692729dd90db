"""A run: its stages in the order of the catalog, what is complete skipped, and a summary at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .. import catalog, distributed
from ..config import Config
from ..config.load import dump_config
from ..data.left_out import counted
from ..errors import Interrupted
from ..runs import layout
from ..train import memory
from ..train.device import crowded
from ..train.signals import stop_requests
from .accept import accept, as_ran, fork
from .context import Context
from .few_labels import declared
from .held_out import write_names
from .samples import keep_pictures, keep_samples
from .stage import BANK, UntrainedStage
from .summary import write_summary
from .training import Forecast, train_stage


def run_stages(
    config: Config,
    names: Sequence[str] | None = None,
    *,
    forecast: Forecast | None = None,
    redo: Sequence[str] = (),
    fork_of: Path | None = None,
) -> None:
    """Do the named stages (default: those of the settings) in the catalog's order; what is complete is skipped. Then write summary.json.

    forecast: what predicts the memory of a stage for its log, such as `memory_plan.peak.forecast`; None: nothing does.
    redo: stages that are thrown away, with all that started from them, where their settings changed. fork_of: the folder of a run whose
    finished stages are taken over where these settings would make them alike.

    Raises CheckpointError before the first step where the folder holds stages of other settings, or where a stage lacks one that it
    starts from.
    """
    wanted = config.stages if names is None else names
    with distributed.session(config.loop.device):
        context = Context(config)
        with context.run.leaves_nothing_if_refused(), context.run.exclusive(), stop_requests() as stop:
            context.stop = stop
            if fork_of is not None and distributed.is_main():
                fork(context, fork_of)
            distributed.barrier()
            rows = [row for row in catalog.STAGES if row.name in wanted]
            accept(context, rows, redo)
            _introduce(context, rows)
            if context.device.type == "cpu" and (warning := crowded()) is not None:
                context.run.say(warning)
            try:
                for row in rows:
                    memory.reset_peak(context.device)
                    _do(context, row, forecast)
            except KeyboardInterrupt:  # the second Ctrl-C, in a stage without a loop
                raise Interrupted(
                    "Interrupted; finished stages are kept. Start the same command again to go on."
                ) from None
            write_summary(context)
        context.run.close()


def _do(context: Context, row: catalog.Stage, forecast: Forecast | None) -> None:
    if row.net is None:
        return _write(context, row, catalog.load(row.home))
    trainee = train_stage(context, row, declared(row, context.config), forecast)
    bank = trainee.modules.get(BANK)
    if bank is not None:
        assert isinstance(bank.prototypes, Tensor)
        keep_samples(context, trainee.net.model, bank.prototypes)
    elif row.role == "result":
        keep_pictures(context)


def _write(context: Context, row: catalog.Stage, stage: UntrainedStage) -> None:
    """Raises CheckpointError where the stage is complete with other settings."""
    identity = context.identity(row)
    if context.run.is_done(row.name, identity):
        context.run.say(f"{row.name}: finished before")
        return
    facts = stage.write(context, next(iter(context.inputs(row)), None))
    context.run.mark_done(row.name, identity, **facts)
    distributed.barrier()


def _introduce(context: Context, rows: Sequence[catalog.Stage]) -> None:
    """What the folder says of itself while the run goes on: its classes and settings, which what it holds has accepted."""
    classes, run = context.classes, context.run
    run.write_json(layout.CLASSES, classes.as_json())
    run.write_text(layout.CONFIG, dump_config(as_ran(context, rows)))
    labelled, held_out = context.domains.labelled_target, context.domains.held_out
    learn = any(catalog.depends_on_labelled(row, context.config.target.fold) for row in rows)
    write_names(context, learned=learn)
    if held_out is not None:
        run.say(f"evaluated: {context.domains.evaluated_words(len(held_out))}, listed in {layout.HELD_OUT}")
    if labelled is not None and any(row.few_labels for row in rows):
        learning = ", ".join(row.name for row in rows if row.few_labels)
        run.say(
            f"{counted(len(labelled), 'labelled target image')}, listed in {layout.LABELLED}: {learning} learn from them"
        )
