"""Where does the contrast help? Each variant next to `plain`, which has no contrastive term."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.adaptation.frozen.chain import AT_ONCE, Adapting, Make, Study, class_means
from spcl_fast import catalog
from spcl_fast.estimators import PrototypeBank
from spcl_fast.losses.spcl import SPCLObjective
from spcl_fast.models import SegmentationModel
from spcl_fast.models.head import JoinedMaps
from spcl_fast.ops import prototype_contrastive_loss

_SEEN = 656  # source views that first prototypes are means of


def _started(study: Study, model: SegmentationModel, loss: str) -> SPCLObjective:
    """A loss of the catalog, whose prototypes are the source's mean features."""
    make = catalog.load(catalog.find(catalog.LOSSES, loss).home)
    objective = make(len(study.classes), model.channels, study.config.adapt)
    bank = PrototypeBank(len(study.classes), model.channels, normalize=study.config.adapt.normalize)
    return objective.load_(study.prototypes(model, study.domains.source, _source_labels(study), bank))


def _source_labels(study: Study) -> Tensor:
    return study.domains.source.labels_of(torch.arange(min(_SEEN, len(study.domains.source.labels))))


def _catalog(loss: str) -> Make:
    return lambda study, model: Adapting(_started(study, model, loss))


class _Changed(nn.Module):
    """SPCL's objective with another loss in it."""

    def __init__(self, objective: SPCLObjective) -> None:
        super().__init__()
        self.inner = objective

    @property
    def prototypes(self) -> Tensor:
        return self.inner.prototypes

    @property
    def chance(self) -> float:
        return self.inner.chance

    def update_(self, features: Tensor, labels: Tensor) -> _Changed:
        self.inner.update_(features, labels)
        return self

    def update_in_parts_(self, parts: Iterable[tuple[Tensor, Tensor]]) -> _Changed:
        self.inner.update_in_parts_(parts)
        return self

    def load_(self, prototypes: Tensor) -> _Changed:
        self.inner.load_(prototypes)
        return self

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.inner(features, labels)


class _LearntTemperature(_Changed):
    def __init__(self, objective: SPCLObjective) -> None:
        super().__init__(objective)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(objective.temperature)))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        temperature = self.log_temperature.exp()
        return prototype_contrastive_loss(features, labels, self.prototypes, temperature=temperature)


class _Prior(_Changed):
    """Logits adjusted by the log of the source's class shares."""

    def __init__(self, objective: SPCLObjective, shares: Tensor) -> None:
        super().__init__(objective)
        self.bias = shares.clamp_min(1e-6).log()

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        temperature = self.inner.temperature
        return prototype_contrastive_loss(features, labels, self.prototypes, temperature=temperature, bias=self.bias)


class _Anchored(_Changed):
    """Fixed anchors in the space of the frozen encoder, which features are mapped to by what is learned."""

    def __init__(self, objective: SPCLObjective, anchors: Tensor) -> None:
        super().__init__(objective)
        self.anchors = anchors
        self.map = nn.Conv2d(objective.prototypes.shape[1], anchors.shape[1], 1)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return prototype_contrastive_loss(self.map(features), labels, self.anchors, temperature=self.inner.temperature)


class _Projected(_Changed):
    """The contrast on a projection head; its prototypes live there, too."""

    def __init__(self, objective: SPCLObjective, head: nn.Module) -> None:
        super().__init__(objective)
        self.head = head

    def update_(self, features: Tensor, labels: Tensor) -> _Projected:
        with torch.no_grad():
            self.inner.update_(self.head(features), labels)
        return self

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.inner(self.head(features), labels)


class _BothDomains(_Changed):
    """Prototypes that the target's pseudo-labels move, too: of the two losses of a step the second is the target's."""

    def __init__(self, objective: SPCLObjective) -> None:
        super().__init__(objective)
        self.of_source = False

    def update_(self, features: Tensor, labels: Tensor) -> _BothDomains:
        self.of_source = True
        super().update_(features, labels)
        return self

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        if not self.of_source:
            self.inner.update_(features.detach(), labels)
        self.of_source = False
        return self.inner(features, labels)


def _learnt_temperature(study: Study, model: SegmentationModel) -> Adapting:
    changed = _LearntTemperature(_started(study, model, "spcl"))
    return Adapting(changed, (changed.log_temperature,), multiplier=10)


def _prior(study: Study, model: SegmentationModel) -> Adapting:
    shares = study.context.domains.source_shares()
    return Adapting(_Prior(_started(study, model, "spcl"), torch.tensor(list(shares.values()))))


def _anchored(study: Study, model: SegmentationModel) -> Adapting:
    """Anchors: the source's class means in the encoder's two maps, next to each other."""
    source, labels = study.domains.source, _source_labels(study)
    joined = JoinedMaps()
    bank = PrototypeBank(len(study.classes), sum(maps.shape[1] for maps in (source.skip, source.deep)))
    rows = torch.arange(len(labels)).split(AT_ONCE)
    anchors = class_means(bank.moments(joined(*source.maps(some)), labels[some]) for some in rows)
    changed = _Anchored(_started(study, model, "spcl"), anchors)
    return Adapting(changed, tuple(changed.map.parameters()))


def _projected(study: Study, model: SegmentationModel) -> Adapting:
    dim = model.channels
    head = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1))
    objective = _started(study, model, "spcl")
    bank = PrototypeBank(len(study.classes), dim)
    objective.load_(study.prototypes(model, study.domains.source, _source_labels(study), bank, seen=head))
    return Adapting(_Projected(objective, head), tuple(head.parameters()))


def _both(study: Study, model: SegmentationModel) -> Adapting:
    return Adapting(_BothDomains(_started(study, model, "spcl")))


class Variant(NamedTuple):
    summary: str
    make: Make
    weight: float | None = None  # of the contrastive term; None: adapt.contrast_weight
    in_distillation: bool = False  # the contrast goes on pulling there
    rectified: bool = False  # pseudo-labels for distillation are ProDA's
    labels: int = 0  # labelled images of the target, in every stage from the one that puts them on top of source-only
    next_to: str = "plain"  # what its row is compared with


VARIANTS = {
    "plain": Variant("no contrastive term", _catalog("spcl"), weight=0),
    "spcl": Variant("SPCL's term, as in the recipe", _catalog("spcl")),
    "anchors": Variant("against fixed anchors: class means of the frozen encoder's maps", _anchored),
    "kept_on": Variant("kept on during distillation", _catalog("spcl"), in_distillation=True),
    "several": Variant("several prototypes per class, ProtoSeg", _catalog("protoseg")),
    "learnt": Variant("temperature learnt", _learnt_temperature),
    "prior": Variant("logits adjusted by the class prior", _prior),
    "projected": Variant("on a projection head", _projected),
    "both": Variant("prototypes from both domains", _both),
    "plain_rectified": Variant("no contrastive term, pseudo-labels rectified (ProDA)", _catalog("spcl"), weight=0, rectified=True),
    "rectified": Variant("SPCL's term, pseudo-labels rectified (ProDA)", _catalog("spcl"), rectified=True),
    "plain_10": Variant("no contrastive term, 10 labelled images", _catalog("spcl"), weight=0, labels=10),
    "spcl_10": Variant("SPCL's term, 10 labelled images, less the row above", _catalog("spcl"), labels=10, next_to="plain_10"),
}  # fmt: skip
