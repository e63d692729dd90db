"""Segmentation loss on source; contrastive loss of both domains against the prototypes, which follow the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import catalog
from ..config import AdaptConfig, Config
from ..data import Batch
from ..data.classes import IGNORE
from ..losses.objective import Objective
from ..models.chain import statistics_kept
from ..ops import agreement_labels, labels_on, upsampled_cross_entropy
from ..train import memory
from ..train.lean import LeanModel
from ..train.meter import Weighted
from .nets import Nets
from .parts import Shown, backward, is_labelled, never, parts_of, predicted_share, shares, total
from .pseudo_labels import FIRST
from .stage import BANK, OWN, Feed, Trainee, forward_shapes


class Adapt:
    name = "adapt"

    def feeds(self, config: Config) -> tuple[Feed, ...]:
        train = config.adapt
        return Feed("source", OWN, train.augment), Feed("target", FIRST.folder(config), train.target_augment)

    def build(self, config: Config, nets: Nets) -> Trainee:
        train = config.adapt
        model = nets.start()
        make = catalog.load(catalog.find(catalog.LOSSES, train.loss).home)
        objective = nets.place(make(nets.num_classes, model.channels, train))
        objective.load_(nets.prototypes(model.channels).to(nets.device))
        class_weight = nets.class_weight("source", train.class_weight_power)
        net = nets.lean(model, forward_shapes(config, train, self.feeds(config)))
        step = AdaptStep(net, objective, train, class_weight, config.loop.accumulate, nets.shown(train))
        return Trainee(step, net, {"model": model, BANK: objective}, {"model": nets.optimizer(model, train)})


STAGE = Adapt()


@dataclass(frozen=True)
class AdaptStep:
    """The prototypes move once per step, by the whole batch, before any contrastive loss.

    Diagnostics take the target classifier forward that training does without (of the last part where there are several).
    """

    net: LeanModel
    objective: Objective
    train: AdaptConfig
    class_weight: Tensor | None
    accumulate: int = 1
    shown: Shown = never

    def __call__(self, batch: tuple[Batch, Batch], it: int) -> dict[str, Tensor | Weighted]:
        source, target = batch
        return self._source_pass(source) | self._target_pass(target, it)

    def _excess(self, contrast: Tensor, pixels: Tensor) -> Weighted:
        """At a high temperature the loss itself says nothing: what is above chance is logged, of the steps in which a pixel counts."""
        return Weighted(contrast - self.objective.chance, pixels > 0)

    def _source_pass(self, source: Batch) -> dict[str, Tensor | Weighted]:
        """-> segmentation loss, contrastive loss above chance, share of the labelled pixels that are predicted right."""
        parts = parts_of(source, self.accumulate)
        agreements = _move_prototypes_first(self.net, self.objective, parts) if self.accumulate > 1 else [None]
        share_of_labels = shares([part.labels for part in parts], self.class_weight)
        share_of_agreed = shares(agreements)
        segmentations, contrasts, pixels = [], [], []
        for part, agreed, share, contrast_share in zip(
            parts, agreements, share_of_labels, share_of_agreed, strict=True
        ):
            features, logits = self.net(part.images)
            with memory.phase("loss"):
                if agreed is None:
                    agreed = agreement_labels(part.labels, logits.argmax(1))
                    self.objective.update_(features.detach(), agreed)
                pixels.append(torch.stack([_labelled(agreed), _labelled(labels_on(part.labels, agreed.shape[1:]))]))
                segmentation = share * upsampled_cross_entropy(
                    logits, part.labels, temperature=self.train.temperature, class_weight=self.class_weight
                )
                pull = contrast_share * self.objective(features, agreed)
                loss = segmentation + self.train.contrast_weight * pull
            del features, logits  # the graph frees them as soon as its backward is past them
            backward(loss)
            segmentations.append(segmentation.detach())
            contrasts.append(pull.detach())
        agreeing, labelled = total(pixels)
        return {
            "segmentation": Weighted(total(segmentations), is_labelled(source)),
            "source_excess": self._excess(total(contrasts), agreeing),
            "source_agreement": Weighted(agreeing / labelled.clamp_min(1), labelled),
        }

    def _target_pass(self, target: Batch, it: int) -> dict[str, Tensor | Weighted]:
        """-> contrastive loss above chance, diagnostics where they are shown."""
        net, parts, contrasts, pixels = self.net, parts_of(target, self.accumulate), [], []
        grids = [labels_on(part.labels, net.grid(part.images)) for part in parts] if self.accumulate > 1 else [None]
        for part, share in zip(parts, shares(grids), strict=True):
            features = net.features(part.images)
            with memory.phase("loss"):
                pull = share * self.objective(features, part.labels)
                loss = self.train.contrast_weight * pull
                pixels.append(_labelled(labels_on(part.labels, features.shape[2:])))
            features = features.detach() if self.shown(it) else None
            backward(loss)
            contrasts.append(pull.detach())
        more = {} if features is None else diagnostics(net, features, parts[-1].labels, self.objective.prototypes)
        return {"target_excess": self._excess(total(contrasts), total(pixels)), **more}


def _labelled(labels: Tensor) -> Tensor:
    """How many pixels have a label, 0-dim."""
    return (labels != IGNORE).sum()


@torch.no_grad()
def _move_prototypes_first(net: LeanModel, objective: Objective, parts: list[Batch]) -> list[Tensor]:
    """A forward of every part only to move the prototypes by the whole batch; costs one source forward. -> the parts' agreement labels."""
    agreements: list[Tensor] = []

    def seen() -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            features, logits = net(part.images)
            agreements.append(agreement_labels(part.labels, logits.argmax(1)))
            yield features, agreements[-1]

    with statistics_kept(net.model):
        objective.update_in_parts_(seen())
    return agreements


@torch.no_grad()
def diagnostics(net: LeanModel, features: Tensor, labels: Tensor, prototypes: Tensor) -> dict[str, Tensor]:
    """What shows a collapse while the loss still falls: predicted and kept shares of each class on target, length of each prototype, and
    its cosine to the nearest other one.
    """
    num_classes = prototypes.shape[0]
    with memory.phase("loss"):
        kept = F.one_hot(labels.long().clamp_max(num_classes), num_classes + 1).float().mean((0, 1, 2))[:num_classes]
        unit = F.normalize(prototypes.float(), dim=1)
        nearest = (unit @ unit.T).fill_diagonal_(-1.0).amax(1)
        return {
            "predicted_share": predicted_share(net.classify(features)),
            "kept_share": kept,
            "prototype_norm": prototypes.norm(dim=1),
            "prototype_nearest": nearest,
        }
