"""A few labelled images of the target, in the steps of every stage that the catalog lets learn from them.

Such a stage gets one more batch, of those images alone, and cross-entropy on it; everything else of the stage stays as it is declared.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import catalog
from ..config import Config, TrainConfig
from ..train.meter import Values
from .nets import Nets
from .parts import segmentation_pass
from .stage import LABELLED, Batches, Feed, TrainedStage, Trainee


def declared(row: catalog.Stage, config: Config) -> TrainedStage:
    """The trained stage of a row, as these settings have it."""
    stage: TrainedStage = catalog.load(row.home)
    return stage if config.target.labelled is None or not row.few_labels else WithLabelled(stage, row.section, row.name)


@dataclass
class WithLabelled:
    """A stage with one more feed."""

    stage: TrainedStage
    section: str
    name: str

    def feeds(self, config: Config) -> tuple[Feed, ...]:
        return *self.stage.feeds(config), Feed("target", LABELLED, self._train(config).augment)

    def build(self, config: Config, nets: Nets) -> Trainee:
        train, trainee = self._train(config), self.stage.build(config, nets)
        # by the shares of the source: those of the target's labels are not known
        class_weight = nets.class_weight("source", train.class_weight_power)

        def step(batch: tuple[Any, ...], it: int) -> Values:
            *others, labelled = batch
            values = trainee.step(_as_fed(others), it)
            supervised = segmentation_pass(
                trainee.net,
                labelled,
                config.loop.accumulate,
                temperature=train.temperature,
                class_weight=class_weight,
                weight=train.labelled_weight,
            )
            return {**values, "labelled": supervised}

        return dataclasses.replace(trainee, step=step, around=lambda batches: _past(trainee, batches))

    def _train(self, config: Config) -> TrainConfig:
        return getattr(config, self.section)


def _as_fed(batches: list[Any]) -> Any:
    """What a step takes: the one batch, or a tuple of several."""
    return batches[0] if len(batches) == 1 else tuple(batches)


def _past(trainee: Trainee, batches: Batches) -> Batches:
    """What changes the stage's own batches on their way, without the labelled ones, which go past it."""

    def stream(start: int) -> Iterator[tuple[Any, ...]]:
        waiting: deque[Any] = deque()

        def own(first: int) -> Iterator[Any]:
            for *others, labelled in batches(first):
                waiting.append(labelled)
                yield _as_fed(others)

        for others in trainee.around(own)(start):
            yield (*(others if isinstance(others, tuple) else (others,)), waiting.popleft())

    return stream
