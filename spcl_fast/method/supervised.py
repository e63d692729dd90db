"""Cross-entropy on one labelled domain: source-only, its matched control, the start with a few labels, and the oracle."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config import Config, SourceConfig, TrainConfig
from ..data import Batch
from ..train.lean import LeanModel
from ..train.meter import Values
from .nets import Nets
from .parts import Step, segmentation_pass
from .stage import OWN, Feed, Trainee, forward_shapes


@dataclass(frozen=True)
class Supervised:
    """Trains on the labels of one domain."""

    name: str
    side: str

    def feeds(self, config: Config) -> tuple[Feed, ...]:
        return (Feed(self.side, OWN, self._settings(config).augment),)

    def build(self, config: Config, nets: Nets) -> Trainee:
        train = self._settings(config)
        model = nets.start()
        class_weight = nets.class_weight(self.side, train.class_weight_power)
        net = nets.lean(model, forward_shapes(config, train, self.feeds(config)))
        step = supervised_step(net, train, class_weight, config.loop.accumulate)
        return Trainee(step, net, {"model": model}, {"model": nets.optimizer(model, train)})

    def _settings(self, config: Config) -> SourceConfig:
        return getattr(config, self.name)


SOURCE_ONLY = Supervised("source_only", "source")  # the plain baseline
CONTROL = Supervised("control", "source")  # the baseline's net, trained on: what more training alone gives
FEW_LABELS = Supervised(
    "few_labels", "source"
)  # with the batch of target.labelled: where adaptation starts from if there are any
ORACLE = Supervised("oracle", "target")  # the upper bound; no other stage reads the target's training labels


def supervised_step(net: LeanModel, train: TrainConfig, class_weight: Tensor | None, accumulate: int = 1) -> Step:
    def step(batch: Batch, it: int) -> Values:
        return {
            "segmentation": segmentation_pass(
                net, batch, accumulate, temperature=train.temperature, class_weight=class_weight
            )
        }

    return step
