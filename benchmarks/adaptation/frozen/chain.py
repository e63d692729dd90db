"""The product's own steps on views: source-only, its control, adaptation and distillation of a net whose encoder is frozen.

A row of the views stands in a batch for its image, so that steps, losses and optimizers are those of the stages.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.adaptation.frozen.views import Domains, Views, views_of
from spcl_fast import catalog
from spcl_fast.config import Config, TrainConfig
from spcl_fast.data import Batch
from spcl_fast.data.classes import IGNORE
from spcl_fast.estimators import PrototypeBank, PseudoLabelThresholds
from spcl_fast.losses.objective import Objective
from spcl_fast.losses.proda import distance_weights
from spcl_fast.method.adapt import STAGE as ADAPT
from spcl_fast.method.adapt import AdaptStep
from spcl_fast.method.context import Context
from spcl_fast.method.distill import STAGE as DISTILL
from spcl_fast.method.domains import class_weight
from spcl_fast.method.nets import Nets
from spcl_fast.method.parts import Beside, Step, segmentation_pass
from spcl_fast.method.supervised import CONTROL, FEW_LABELS, SOURCE_ONLY, Supervised, supervised_step
from spcl_fast.models import SegmentationModel
from spcl_fast.models.lite import LiteFeatures
from spcl_fast.ops import agreement_labels, upsampled_confusion, upsampled_prediction
from spcl_fast.runs.identity import step_seed
from spcl_fast.train.evaluate import Scores
from spcl_fast.train.lean import LeanModel
from spcl_fast.train.schedule import poly_schedule

AT_ONCE = 8  # views in a forward without gradients
Maps = Callable[[Tensor], tuple[Tensor, Tensor]]  # rows -> the encoder's two maps
Make = Callable[["Study", SegmentationModel], "Adapting"]


class Adapting(NamedTuple):
    """What adaptation pulls features with, and what of it is learned besides the net."""

    objective: Objective
    learned: tuple[nn.Parameter, ...] = ()
    multiplier: float = 1.0  # of the head's learning rate


class OnViews(nn.Module):
    """A net as the steps call it, whose images are rows of `views`; only its head and classifier learn."""

    def __init__(self, model: SegmentationModel, maps: Maps) -> None:
        super().__init__()
        self.model, self.maps = model, maps

    def features(self, rows: Tensor) -> Tensor:
        return cast(LiteFeatures, self.model.feature_extractor).head(*self.maps(rows))

    def classify(self, features: Tensor) -> Tensor:
        return self.model.classify(features)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(rows)
        return features, self.classify(features)


class PseudoLabels(NamedTuple):
    labels: Tensor  # [N, H, W] uint8
    kept: float  # share of the pixels
    precision: float  # of the kept ones, by the true labels, which nothing learns from


class Study:
    """One seed of one pair."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.context = config, Context(config)
        self.classes = self.context.classes
        self.nets = Nets(config, len(self.classes), self.context.device, self.context.precision)
        self.domains: Domains = views_of(config, folder)
        source = self.context.domains.dataset("source", "train")
        self.class_weight = class_weight(source, config.adapt.class_weight_power)

    # ---- nets ------------------------------------------------------------------------------------------------------------------------

    def source_only(self) -> SegmentationModel:
        return self._supervised(SOURCE_ONLY, self.nets.new().freeze_body().eval())  # the head has no mode

    def control(self, model: SegmentationModel) -> SegmentationModel:
        return self._supervised(CONTROL, copy.deepcopy(model))

    def few_labels(self, model: SegmentationModel) -> SegmentationModel:
        return self._supervised(FEW_LABELS, copy.deepcopy(model))

    def adapted(
        self, start: SegmentationModel, make: Make, labels: Tensor, *, weight: float
    ) -> tuple[SegmentationModel, Objective]:
        model, train = copy.deepcopy(start), dataclasses.replace(self.config.adapt, contrast_weight=weight)
        torch.manual_seed(step_seed(self.config.seed, f"study/{ADAPT.name}", 0))
        adapting = make(self, start)
        net = self._lean(model)
        step = AdaptStep(net, adapting.objective, train, self.class_weight)
        self._fit(
            model,
            train,
            self._with_labelled(ADAPT.name, net, train, step),
            self._pairs(ADAPT.name, train, labels),
            adapting,
        )
        return model, adapting.objective

    def distilled(
        self, start: SegmentationModel, labels: Tensor, contrast: Objective | None = None
    ) -> SegmentationModel:
        """contrast: a loss that goes on pulling both domains, with the weight that it has in adaptation."""
        model, train = copy.deepcopy(start), self.config.distill
        net = self._lean(model)
        shift, weight = len(self.domains.source.labels), self.config.adapt.contrast_weight

        def pull(batch: Batch) -> Tensor:
            assert contrast is not None
            features, logits = net(batch.images)
            seen = batch.labels
            if int(batch.images.min()) < shift:
                seen = agreement_labels(batch.labels, logits.argmax(1))
                contrast.update_(features.detach(), seen)
            return weight * contrast(features, seen)

        beside: Beside | None = None if contrast is None else pull

        def step(batch: Any, it: int) -> Any:
            for part, weights in zip(batch, (self.class_weight, None), strict=True):
                segmentation_pass(net, part, 1, temperature=train.temperature, class_weight=weights, beside=beside)

        self._fit(
            model, train, self._with_labelled(DISTILL.name, net, train, step), self._pairs(DISTILL.name, train, labels)
        )
        return model

    def _supervised(self, stage: Supervised, model: SegmentationModel) -> SegmentationModel:
        train: TrainConfig = getattr(self.config, stage.name)
        net = self._lean(model)
        step = supervised_step(net, train, self.class_weight)
        if catalog.find(catalog.STAGES, stage.name).few_labels:
            step = self._with_labelled(stage.name, net, train, step)
        self._fit(model, train, step, self._source(stage.name, train))
        return model

    def _with_labelled(self, stage: str, net: LeanModel, train: TrainConfig, step: Step) -> Step:
        """The step, and cross-entropy on a batch of the labelled images, as `method/few_labels.py` has it."""
        labelled = self.domains.labelled
        if labelled is None:
            return step
        rows = self._rows(f"{stage}/labelled", len(labelled.labels), train.batch_size)
        shift = len(self.domains.source.labels) + len(self.domains.target.labels)

        def both(batch: Any, it: int) -> Any:
            step(batch, it)
            chosen = next(rows)
            part = Batch(chosen + shift, labelled.labels_of(chosen), [])
            segmentation_pass(
                net,
                part,
                1,
                temperature=train.temperature,
                class_weight=self.class_weight,
                weight=train.labelled_weight,
            )

        return both

    def _lean(self, model: SegmentationModel) -> LeanModel:
        return LeanModel(cast(SegmentationModel, OnViews(model, _joined(self.domains))), self.nets.precision)

    def _fit(
        self,
        model: SegmentationModel,
        train: TrainConfig,
        step: Step,
        batches: Iterator[Any],
        adapting: Adapting | None = None,
    ) -> None:
        optimizer, factor = self.nets.optimizer(model, train), poly_schedule(train)
        if adapting is not None and adapting.learned:
            rate = train.lr * train.head_multiplier * adapting.multiplier
            optimizer.add_param_group({"params": list(adapting.learned), "lr": rate})
        rates = [group["lr"] for group in optimizer.param_groups]
        for it in range(train.iterations):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(it)
            optimizer.zero_grad()
            step(next(batches), it)
            optimizer.step()

    # ---- batches ---------------------------------------------------------------------------------------------------------------------

    def _source(self, stage: str, train: TrainConfig) -> Iterator[Batch]:
        views = self.domains.source
        for rows in self._rows(f"{stage}/source", len(views.labels), train.batch_size):
            yield Batch(rows, views.labels_of(rows), [])

    def _pairs(self, stage: str, train: TrainConfig, labels: Tensor) -> Iterator[tuple[Batch, Batch]]:
        """A batch of each domain; labels: of the target's views."""
        shift, target = len(self.domains.source.labels), self._rows(f"{stage}/target", len(labels), train.batch_size)
        for source, rows in zip(self._source(stage, train), target, strict=True):
            yield source, Batch(rows + shift, labels[rows], [])

    def _rows(self, name: str, count: int, batch_size: int) -> Iterator[Tensor]:
        draw = torch.Generator().manual_seed(step_seed(self.config.seed, f"study/{name}", 0))
        while True:
            yield torch.randperm(count, generator=draw)[:batch_size]

    # ---- what is read off a net ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def miou(self, model: SegmentationModel) -> float:
        """In percent, over the evaluated images."""
        views, total = self.domains.evaluated, torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        for rows, _, logits in self._forwards(model, views):
            total += upsampled_confusion(logits, views.labels_of(rows))
        found = Scores(self.classes, total.numpy()).miou
        assert found is not None
        return found

    @torch.no_grad()
    def prototypes(
        self,
        model: SegmentationModel,
        views: Views,
        labels: Tensor,
        bank: PrototypeBank,
        seen: Callable[[Tensor], Tensor] = lambda features: features,
    ) -> Tensor:
        """[K, D]: the mean feature of each class over the first views, as many as there are labels."""
        forwards = self._forwards(model, views, len(labels))
        return class_means(bank.moments(seen(features), labels[rows]) for rows, features, _ in forwards)

    @torch.no_grad()
    def pseudo_labels(self, model: SegmentationModel, *, rectified: bool = False) -> PseudoLabels:
        """rectified: by the distances to the mean features of the target's own pseudo-labels, once (ProDA does so on the fly)."""
        views, settings = self.domains.target, self.config.pseudo_label
        size = cast(tuple[int, int], views.labels.shape[1:])
        prototypes = None
        if rectified:
            first = self.pseudo_labels(model).labels
            bank = PrototypeBank(len(self.classes), model.channels, normalize=False)
            prototypes = self.prototypes(model, views, first, bank)
        logits = []
        for _, features, found in self._forwards(model, views):
            weights = None if prototypes is None else distance_weights(features, prototypes)
            logits.append(found if weights is None else found.log_softmax(1) + weights.log())
        cap = 1.0 if rectified else settings.cap  # what is rectified is surer
        thresholds = PseudoLabelThresholds(len(self.classes), quantile=settings.quantile, cap=cap)
        for found in logits:
            thresholds.update(upsampled_prediction(found, size)[:2])
        applied = thresholds.thresholds()
        labels = torch.cat([upsampled_prediction(found, size, thresholds=applied).labels for found in logits])
        labels = labels.to(torch.uint8)
        truth = views.labels_of(torch.arange(len(labels)))
        if self.domains.labelled is not None:
            known = torch.from_numpy(np.isin(views.names[:], np.unique(self.domains.labelled.names)))
            labels[known] = truth[known]
        kept = labels != IGNORE
        judged = kept & (truth != IGNORE)
        return PseudoLabels(labels, float(kept.float().mean()), float((labels == truth)[judged].float().mean()))

    def _forwards(
        self, model: SegmentationModel, views: Views, count: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        net = OnViews(model, views.maps)
        for rows in torch.arange(len(views.labels) if count is None else count).split(AT_ONCE):
            yield rows, *net(rows)


def class_means(moments: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """[K, D] of the sums [K, D] and counts [K] of parts; 0 for a class that none has."""
    sums, counts = (torch.stack(part).sum(0) for part in zip(*moments, strict=True))
    return sums / counts.clamp_min(1)[:, None]


def _joined(domains: Domains) -> Maps:
    """Rows of the source, behind them those of the target, behind them those of the labelled images; a batch is of one of them."""
    parts = [part for part in (domains.source, domains.target, domains.labelled) if part is not None]
    starts = list(itertools.accumulate((len(part.labels) for part in parts), initial=0))

    def maps(rows: Tensor) -> tuple[Tensor, Tensor]:
        at = bisect.bisect_right(starts, int(rows.min())) - 1
        return parts[at].maps(rows - starts[at])

    return maps
