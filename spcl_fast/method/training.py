"""A trained stage of a run: its declaration, the run's data and nets, and the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import catalog
from ..config import Config, TrainConfig
from ..data import Dataset, with_pseudo_labels
from ..data.left_out import counted
from ..errors import ConfigError
from ..models import SegmentationModel
from ..models.norm import enough_pixels
from ..runs import layout
from ..runs.signs import signs
from ..train.loop import fit
from ..train.schedule import poly_schedule
from .context import Context
from .domains import class_weight
from .evaluation import evaluate_stage, keep_best, needs_evaluation
from .labels import check_own_labels, check_pseudo_labels
from .nets import Nets
from .parts import Shown
from .prototypes import read_prototypes
from .stage import LABELLED, NONE, OWN, Batches, Feed, TrainedStage, Trainee

Forecast = Callable[[Config, str, int], Mapping[str, Any]]  # settings, stage, number of classes -> what plan.json holds


class RunNets(Nets):
    """Nets that go on from what earlier stages left in the run's folder."""

    def __init__(self, context: Context, inputs: tuple[str, ...]) -> None:
        super().__init__(context.config, len(context.classes), context.device, context.precision)
        self.context, self.inputs = context, inputs

    def start(self, *, freeze_bn: bool | None = None) -> SegmentationModel:
        if not self.inputs:
            return self.new(freeze_bn=freeze_bn)
        return self.context.model_of(self.inputs[0], freeze_bn=freeze_bn)

    def prototypes(self, dim: int) -> Tensor:
        return read_prototypes(self.context.run)

    def class_weight(self, side: str, power: float) -> Tensor | None:
        weight = class_weight(self.context.domains.learnt_from(side), power)
        return None if weight is None else weight.to(self.device)

    def classes_named(self, names: str | None, *, default: Sequence[str]) -> Tensor:
        classes = self.context.classes
        wanted = classes.named(names) if names else [name for name in default if name in classes.names] or classes.names
        return torch.tensor([name in wanted for name in classes.names], device=self.device)

    def shown(self, train: TrainConfig) -> Shown:
        every = self.config.loop.log_every
        return lambda it: (it + 1) % every == 0 or it + 1 == train.iterations


def train_stage(context: Context, row: catalog.Stage, stage: TrainedStage, forecast: Forecast | None) -> Trainee:
    """Fit the stage's net, or what is left of it, then evaluate it on the target's validation images."""
    train: TrainConfig = context.settings(row)
    feeds, todo = stage.feeds(context.config), context.run.done(row.name) is None
    own = [feed for feed in feeds if feed.labels in (OWN, LABELLED)]
    for feed in own if todo else ():
        check_own_labels(context, row.name, feed, fed_dataset(context, feed))
    trainee = stage.build(context.config, RunNets(context, context.inputs(row)))
    if todo:
        pseudo = [fed_dataset(context, feed) for feed in feeds if feed.labels not in (OWN, NONE, LABELLED)]
        check_pseudo_labels(context, row.name, pseudo, alone=not own)
    model = trainee.net.model.train()
    with enough_pixels(row.section):
        result = fit(
            stage=row.name,
            run=context.run,
            modules=trainee.modules,
            optimizers=trainee.optimizers,
            step=trainee.step,
            batches=trainee.around(batches_of(context, row.name, train, stage.feeds(context.config))),
            iterations=train.iterations,
            schedule=poly_schedule(train),
            seed=context.config.seed,
            settings=context.config.loop,
            identity=context.identity(row),
            at_checkpoint=lambda done: keep_best(context, row.name, model, done),
            predicted_peak=lambda: _predicted_peak(context, row.name, forecast),
            watch=warn_of_collapse(context),
        )
    if result.skipped:
        context.run.say(f"{row.name}: finished before ({counted(result.steps, 'iteration')})")
    if not result.skipped or needs_evaluation(context, row.name):
        picked = context.config.evaluate.selection != "last"
        evaluate_stage(context, row.name, context.model_of(row.name) if picked else model)
    return trainee


def batches_of(context: Context, stage: str, train: TrainConfig, feeds: tuple[Feed, ...]) -> Batches:
    """start -> what the stage's step takes, from that iteration on: a batch, or a tuple with one of each feed."""
    pin = context.device.type == "cuda"
    streams = [
        context.domains.batches(stage, feed.side, fed_dataset(context, feed), train, feed.augment, pin_memory=pin)
        for feed in feeds
    ]
    if len(streams) == 1:
        return streams[0]
    return lambda start: zip(*(stream(start) for stream in streams), strict=False)


def fed_dataset(context: Context, feed: Feed) -> Dataset:
    """The images of a feed with its labels."""
    domains = context.domains
    if feed.labels == OWN:
        return domains.learnt_from(feed.side)
    if feed.labels == LABELLED:
        assert domains.labelled_target is not None  # or there would be no such feed
        return domains.labelled_target
    if feed.labels == NONE:
        return domains.dataset(feed.side, "train", labels=False)
    images = domains.unlabelled_target() if feed.side == "target" else domains.dataset(feed.side, "train", labels=False)
    return with_pseudo_labels(images, feed.labels)


def warn_of_collapse(context: Context) -> Callable[[Mapping[str, Any]], None]:
    """Says each sign of a collapse in a stage's log lines once."""
    said: set[str] = set()

    def watch(record: Mapping[str, Any]) -> None:
        for sign in signs(record, context.classes.names, context.domains.source_shares, context.setting):
            if sign.title not in said:
                context.run.say(f"warning: {sign.title}. {sign.text}")
            said.add(sign.title)

    return watch


def _predicted_peak(context: Context, stage: str, forecast: Forecast | None) -> int | None:
    """What `spcl-fast plan` says for this device; None where it cannot tell, which must not stop a training.

    Also keeps in <stage>/plan.json what each memory-saving setting saves, for the report.
    """
    if forecast is None:
        return None
    loop = dataclasses.replace(context.config.loop, device=context.device.type)
    try:
        record = forecast(dataclasses.replace(context.config, loop=loop), stage, len(context.classes))
        context.run.write_json(layout.of_stage(stage, layout.PLAN), record)
        return record["peak_bytes"]
    except ConfigError:
        raise  # the step would end in the same
    except Exception as error:
        context.run.say(f"{stage}: its memory could not be predicted: {type(error).__name__}: {error}")
        return None
