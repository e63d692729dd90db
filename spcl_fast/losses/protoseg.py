"""ProtoSeg (Zhou et al., arXiv 2203.15102): pixels against M prototypes per class, pulled to the one that Sinkhorn assigns.

s_r = <u, p_r>,  u = x/|x|,  p_r unit,  r over K M rows;   row y of a pixel: `PrototypeClusters.assign`
PPC = mean over labelled pixels of  -log softmax(s / temperature)[y]         (pixel-prototype contrast, temperature 1)
PPD = mean over labelled pixels of  (1 - s_y)^2                             (pixel-prototype distance)
loss = 0.01 PPC + 0.001 PPD, next to the cross-entropy of the class logits max_m s_km
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..estimators.assignment import NONE, row_classes
from ..estimators.clusters import PrototypeClusters
from .similarity import labelled_similarity


def pixel_prototype_contrast(
    features: Tensor, row_labels: Tensor, prototypes: Tensor, *, temperature: float = 1.0, normalize: bool = True, ignore_index: int = NONE
) -> Tensor:  # fmt: skip
    """PPC: mean over labelled pixels of -log softmax(<u, p_r> / temperature)[row],  u = x/|x|.

    features [B, D, h, w] or [N, D]; row_labels [B, h, w] or [N], integer, rows of prototypes [K M, D] (not classes)
    as `PrototypeClusters.assign` gives them, -1 where there is none -> [] float32. Prototypes are used as they are: unit rows.
    Differentiable in features and prototypes. Nothing labelled: 0 (the authors' code: NaN).
    Memory: that of prototype_contrastive_loss; the [N, K M] logits are never there. Raises as that op.
    Source: ProtoSeg, arXiv 2203.15102.
    """
    return ops.prototype_contrastive_loss(
        features, row_labels, prototypes, temperature=temperature, normalize=normalize, ignore_index=ignore_index
    )


def pixel_prototype_distance(
    features: Tensor, row_labels: Tensor, prototypes: Tensor, *, normalize: bool = True, ignore_index: int = NONE
) -> Tensor:
    """PPD: mean over labelled pixels of (1 - <u, p_row>)^2,  with the arguments of `pixel_prototype_contrast`.

    features [B, D, h, w] or [N, D]; row_labels [B, h, w] or [N]; prototypes [K M, D], unit rows -> [].
    One dot product per pixel. Memory: the gradient and 8 bytes per pixel. Source: ProtoSeg, arXiv 2203.15102.
    """
    similarity, is_labelled = labelled_similarity(
        features, row_labels, prototypes, normalize=normalize, ignore_index=ignore_index
    )
    return torch.where(is_labelled, (1 - similarity).square(), 0).sum() / is_labelled.sum().clamp_min(1)


def prototype_class_logits(features: Tensor, prototypes: Tensor, *, normalize: bool = True) -> Tensor:
    """max over m of <x/|x|, prototype_km>: what ProtoSeg segments by, before its LayerNorm over classes.

    features [B, D, h, w] or [N, D], prototypes [K, M, D], unit rows -> [B, K, h, w] or [N, K]. Source: ProtoSeg, arXiv 2203.15102.
    """
    num_classes, per_class, _ = prototypes.shape
    return ops.prototype_logits(
        features, prototypes.flatten(0, 1), temperature=1.0, normalize=normalize, pool="max", num_classes=num_classes,
        prototype_class=row_classes(num_classes, per_class, prototypes),
    )  # fmt: skip


class ProtoSegLoss(nn.Module):
    """ppc_weight PPC + ppd_weight PPD, the two terms next to the cross-entropy of the up-sampled class logits.

    forward(features [B, D, h, w] or [N, D], row_labels [B, h, w] or [N], prototypes [K M, D]) -> []: `pixel_prototype_contrast` and
    `pixel_prototype_distance`. Defaults: the authors' configuration. Source: ProtoSeg, arXiv 2203.15102.
    """

    def __init__(
        self,
        ppc_weight: float = 0.01,
        ppd_weight: float = 0.001,
        *,
        temperature: float = 1.0,
        normalize: bool = True,
        ignore_index: int = NONE,
    ) -> None:
        super().__init__()
        self.ppc_weight, self.ppd_weight, self.temperature = ppc_weight, ppd_weight, temperature
        self.normalize, self.ignore_index = normalize, ignore_index

    def forward(self, features: Tensor, row_labels: Tensor, prototypes: Tensor) -> Tensor:
        settings = {"normalize": self.normalize, "ignore_index": self.ignore_index}
        contrast = pixel_prototype_contrast(features, row_labels, prototypes, temperature=self.temperature, **settings)
        return self.ppc_weight * contrast + self.ppd_weight * pixel_prototype_distance(
            features, row_labels, prototypes, **settings
        )


class ProtoSegObjective(nn.Module):
    """PPC + 0.1 PPD of a domain's pixels against clusters that follow the source; the weights keep the authors' ratio."""

    def __init__(self, clusters: PrototypeClusters, temperature: float) -> None:
        super().__init__()
        self.clusters = clusters
        self.loss = ProtoSegLoss(1.0, 0.1, temperature=temperature, normalize=clusters.normalize)

    @property
    def prototypes(self) -> Tensor:
        """[K, D]: the mean of each class's prototypes."""
        return self.clusters.prototypes.mean(1)

    @property
    def chance(self) -> float:
        """Of the softmax over all classes' prototypes."""
        return math.log(len(self.clusters.rows))

    def update_(self, features: Tensor, labels: Tensor) -> ProtoSegObjective:
        self.clusters.update_(features, labels)
        return self

    def update_in_parts_(self, parts: Iterable[tuple[Tensor, Tensor]]) -> ProtoSegObjective:
        """Part by part: Sinkhorn balances within a part, so parts do not add up to the batch exactly."""
        for features, labels in parts:
            self.update_(features, labels)
        return self

    def load_(self, prototypes: Tensor) -> ProtoSegObjective:
        self.clusters.load_(prototypes)
        return self

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        clusters = self.clusters
        return self.loss(features, clusters.assign(features, labels), clusters.rows)


def objective(num_classes: int, dim: int, settings: Any) -> ProtoSegObjective:
    """settings: those of the stage `adapt`. Draws nothing: the likeliest row moves a prototype."""
    clusters = PrototypeClusters(
        num_classes, dim, keep=settings.keep, normalize=settings.normalize, assignment="argmax"
    )
    return ProtoSegObjective(clusters, settings.contrast_temperature)
