"""A frozen copy of the pretrained encoder that the features of a trained net stay near to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import OnlineConfig
from ..data import Batch
from ..losses.feature_distance import counted_cells, feature_distance
from ..models import SegmentationModel
from ..models.encoder_map import EncoderMap
from ..train import memory
from ..train.device import Precision
from ..train.meter import Weighted
from .nets import Nets
from .parts import Beside

# DAFormer's, of Cityscapes' classes: those of ImageNet are things
THINGS = (
    "traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip


class Anchor(NamedTuple):
    encoder: SegmentationModel  # frozen, as it was published
    encoder_map: EncoderMap
    own_map: EncoderMap  # of the net that is trained
    counted: Tensor  # [K] bool
    weight: float
    precision: Precision

    def beside(self, batch: Batch, values: dict[str, Tensor | Weighted]) -> Beside:
        """For every part of the batch, after the net's forward: its share of the weighted distance. It adds up in `values`."""
        counts: list[Tensor] = []

        def distance(part: Batch) -> Tensor:
            own = self.own_map.take()
            with torch.no_grad(), self.encoder_map, self.precision.autocast(), memory.phase("forward"):
                self.encoder.features(part.images)
                frozen = self.encoder_map.take()
            with memory.phase("loss"):
                if not counts:  # of the whole batch, however it is divided
                    cells = counted_cells(batch.labels, own.shape[2:], counted=self.counted)
                    counts.append(cells.sum())
                found = feature_distance(
                    own, frozen, part.labels, counted=self.counted, denominator=counts[0].clamp_min(1)
                )
            before = values.get("feature_distance")
            so_far = found.detach() + (before.value if isinstance(before, Weighted) else 0)
            values["feature_distance"] = Weighted(so_far, counts[0] > 0)
            return self.weight * found

        return distance


def anchor_of(nets: Nets, model: SegmentationModel, train: OnlineConfig) -> Anchor | None:
    """None where the weight is 0, or where there is nothing to stay near to: an encoder of random numbers, or one that stands still."""
    settings = nets.config.model
    if settings.freeze_body or not (train.feature_distance and (settings.weights or settings.pretrained)):
        return None
    counted = nets.classes_named(train.feature_distance_classes, default=THINGS)
    encoder = nets.new().requires_grad_(False).eval()
    return Anchor(encoder, EncoderMap(encoder), EncoderMap(model), counted, train.feature_distance, nets.precision)
