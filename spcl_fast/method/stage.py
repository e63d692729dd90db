"""What a stage is: declared once, in a file of its own, and consumed twice, by training and by the memory plan.

A stage knows its settings (`config.<its section>`) and what a `Nets` gives it; it opens no file while it is built. Which stages it starts
from, in which order stages run and what their nets are called is in catalog.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..config import AugmentConfig, Config, TrainConfig
from ..data.augment import output_size
from ..train.lean import LeanModel
from .context import Context
from .nets import Nets
from .parts import Step

Batches = Callable[[int], Iterator[Any]]  # iteration to start at -> batches without end

OWN, NONE, LABELLED = "own", "none", "labelled"
BANK = "bank"  # the module that holds prototypes, in checkpoints
TRAIN_AGAIN = "Its last step must have been too large: train it again with a lower learning rate, under another name."


@dataclass(frozen=True)
class Feed:
    """One batch of every step."""

    side: str  # "source" | "target"
    # OWN: those of the data set; NONE: all ignored; LABELLED: its images of target.labelled; else a folder of labels
    labels: str | Path
    augment: AugmentConfig

    def size(self, config: Config) -> tuple[int, int]:
        """Width and height of its images."""
        return output_size(self.augment, getattr(config, self.side).size)


def forward_shapes(config: Config, train: TrainConfig, feeds: Sequence[Feed]) -> list[tuple[int, ...]]:
    """[B, 3, H, W] of what one forward sees of each feed."""
    sizes = [feed.size(config) for feed in feeds]
    return [(train.batch_size // config.loop.accumulate, 3, height, width) for width, height in sizes]


def unchanged(batches: Batches) -> Batches:
    return batches


@dataclass
class Trainee:
    """What is trained: a step, and everything with state that it moves."""

    step: Step  # (batch, or a tuple with one batch of each feed; iteration) -> what is logged
    net: LeanModel  # its `model` is the one that is evaluated
    modules: Mapping[str, nn.Module]  # saved in every checkpoint under these names; the net is "model"
    optimizers: Mapping[str, torch.optim.Optimizer]
    around: Callable[[Batches], Batches] = unchanged  # changes the batches on their way to the step


class TrainedStage(Protocol):
    """A stage that trains a net."""

    name: str

    def feeds(self, config: Config) -> tuple[Feed, ...]: ...

    def build(self, config: Config, nets: Nets) -> Trainee: ...


class UntrainedStage(Protocol):
    """A stage that shows images to the net of an earlier one and keeps what it finds."""

    name: str

    def sees(self, config: Config) -> tuple[int, int]:
        """Width and height of the images."""
        ...

    def write(self, context: Context, start: str | None) -> Mapping[str, Any]:
        """Write its files, on the main process; start: the stage whose net it takes. -> facts for its done.json."""
        ...
