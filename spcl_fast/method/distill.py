"""Self-training of the adapted net on its own pseudo-labels; with source_weight > 0 it trains on source batches, too, and with class_mix
parts of them are pasted onto target images.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import distributed
from ..config import Config, DistillConfig
from ..data import with_class_mix
from ..runs.identity import step_seed
from ..train.lean import LeanModel
from ..train.meter import Values, Weighted
from .nets import Nets
from .parts import Shown, Step, never, segmentation_pass, share_into
from .pseudo_labels import SECOND
from .stage import OWN, Batches, Feed, Trainee, forward_shapes, unchanged


class Distill:
    name = "distill"

    def feeds(self, config: Config) -> tuple[Feed, ...]:
        train = config.distill
        target = Feed("target", SECOND.folder(config), train.augment)
        return (Feed("source", OWN, config.adapt.augment), target) if train.source_weight else (target,)

    def build(self, config: Config, nets: Nets) -> Trainee:
        train = config.distill
        model = nets.start(freeze_bn=train.freeze_bn)
        class_weight = nets.class_weight("source", train.class_weight_power) if train.source_weight else None
        net = nets.lean(model, forward_shapes(config, train, self.feeds(config)))
        step = distill_step(net, train, class_weight, config.loop.accumulate, nets.shown(train))
        around = (lambda batches: self._mixed(config, batches)) if train.class_mix else unchanged
        return Trainee(step, net, {"model": model}, {"model": nets.optimizer(model, train)}, around)

    def _mixed(self, config: Config, pairs: Batches) -> Batches:
        seed = step_seed(config.seed, f"{self.name}/mix", 0)
        return with_class_mix(pairs, config.distill.class_mix, seed=seed, rank=distributed.rank())


STAGE = Distill()


def distill_step(
    net: LeanModel,
    train: DistillConfig,
    class_weight: Tensor | None,
    accumulate: int = 1,
    shown: Shown = never,
) -> Step:
    """Cross-entropy on target against its pseudo-labels; with `source_weight` on source, too."""

    def step(batch: Any, it: int) -> Values:
        # what `feeds` declares: target alone, or source and target
        source, target = batch if train.source_weight else (None, batch)
        values: dict[str, Tensor | Weighted] = {}
        common = {"accumulate": accumulate, "temperature": train.temperature}
        if source is not None:
            values["segmentation"] = segmentation_pass(
                net, source, class_weight=class_weight, weight=train.source_weight, **common
            )
        values["distillation"] = segmentation_pass(
            net, target, class_weight=None, look=share_into(values, shown(it)), **common
        )
        return values

    return step
