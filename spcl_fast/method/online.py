"""Self-training with a teacher that follows the net step by step, in place of pseudo-labels on the disk.

In every step: cross-entropy on source; the teacher labels the target batch; the net learns these labels on images with source classes
pasted in and strong colours (class mix), and on images with most of their patches taken away (masked consistency). Labels of the teacher
weigh by the share of the batch that it is sure of. The teacher is the exponential moving average of the net; the net is what is evaluated.

On source the features stay near those of the pretrained encoder (feature distance).

Sources: DAFormer (arXiv 2111.14887; DACS, 2007.08702, before it) without its rare class sampling (`balanced_sampling` is ours); MIC
(arXiv 2212.01322).
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Config, OnlineConfig
from ..data import Batch
from ..data.classes import IGNORE
from ..losses import quality_weight, quality_weighted_cross_entropy
from ..models import SegmentationModel
from ..ops import upsampled_prediction
from ..train import memory
from ..train.lean import LeanModel
from ..train.meter import Values, Weighted
from .anchor import Anchor, anchor_of
from .nets import Nets
from .parts import Look, Shown, backward, never, parts_of, segmentation_pass, share_into, total
from .stage import NONE, OWN, Feed, Trainee, forward_shapes


class Online:
    name = "online"

    def feeds(self, config: Config) -> tuple[Feed, ...]:
        train = config.online
        return Feed("source", OWN, train.augment), Feed("target", NONE, train.target_augment)

    def build(self, config: Config, nets: Nets) -> Trainee:
        train, model = config.online, nets.start()
        teacher = nets.start().requires_grad_(False).eval()
        class_weight = nets.class_weight("source", train.class_weight_power)
        anchor = anchor_of(nets, model, train)
        net = nets.lean(model, forward_shapes(config, train, self.feeds(config)))
        step = OnlineStep(net, teacher, train, class_weight, config.loop.accumulate, nets.shown(train), anchor)
        return Trainee(step, net, {"model": model, "teacher": teacher}, {"model": nets.optimizer(model, train)})


STAGE = Online()


class Taught(NamedTuple):
    """What the teacher says of a batch."""

    labels: Tensor  # [B, H, W] uint8
    weight: Tensor  # [B, H, W]: the same everywhere, the share of pixels that it is sure of


@dataclass(frozen=True)
class OnlineStep:
    net: LeanModel
    teacher: SegmentationModel
    train: OnlineConfig
    class_weight: Tensor | None
    accumulate: int = 1
    shown: Shown = never
    anchor: Anchor | None = None

    def __call__(self, batch: tuple[Batch, Batch], it: int) -> Values:
        source, target = batch
        train = self.train
        values: dict[str, Tensor | Weighted] = {}
        if it:
            follow_(self.teacher, self.net.model, train.ema, it)
        self._learn_source(source, values)
        taught = self._teach(target.images)
        values["sure_share"] = taught.weight[0, 0, 0]
        if train.mix_weight:
            pasted = drawn_classes(source.labels)
            images = torch.where(pasted[:, None], source.images, target.images)
            mixed = Batch(
                strong_colours(images, train.mix_jitter), source.labels.where(pasted, taught.labels), target.names
            )
            weight = taught.weight.masked_fill(pasted, 1.0)
            look = share_into(values, self.shown(it)) if not train.masked_weight else _unseen
            values["mixed"] = self._learn(mixed, weight, train.mix_weight, look)
        if train.masked_weight:
            kept = kept_patches(target.images, train.mask_ratio, train.mask_block)
            masked = dataclasses.replace(target, images=target.images * kept, labels=taught.labels)
            values["masked"] = self._learn(
                masked, taught.weight, train.masked_weight, share_into(values, self.shown(it))
            )
        return values

    def _learn_source(self, source: Batch, values: dict[str, Tensor | Weighted]) -> None:
        beside = None if self.anchor is None else self.anchor.beside(source, values)
        with contextlib.nullcontext() if self.anchor is None else self.anchor.own_map:
            values["segmentation"] = segmentation_pass(
                self.net, source, self.accumulate, temperature=self.train.temperature, class_weight=self.class_weight,
                beside=beside,
            )  # fmt: skip

    @torch.no_grad()
    def _teach(self, images: Tensor) -> Taught:
        labels, weights = [], []
        size = (images.shape[2], images.shape[3])
        for part in images.chunk(self.accumulate):
            with self.net.precision.autocast(), memory.phase("forward"):
                _, logits = self.teacher(part)
            with memory.phase("loss"):
                prediction = upsampled_prediction(logits, size)
            labels.append(prediction.labels)
            weights.append(quality_weight(prediction.confidence, threshold=self.train.confidence))
        share = torch.cat(weights).mean()  # of the whole batch, however it is divided
        return Taught(torch.cat(labels), share.expand(len(images), *size))

    def _learn(self, batch: Batch, weight: Tensor, factor: float, look: Look) -> Tensor:
        """Weighted cross-entropy over all pixels, and its backward times `factor`. -> its value."""
        losses = []
        for part, part_weight in zip(parts_of(batch, self.accumulate), weight.chunk(self.accumulate), strict=True):
            _, logits = self.net(part.images)
            with memory.phase("loss"):
                look(logits.detach())
                loss = (
                    quality_weighted_cross_entropy(logits, part.labels, part_weight, align_corners=True)
                    / self.accumulate
                )
            backward(factor * loss)
            losses.append(loss.detach())
        return total(losses)


def _unseen(logits: Tensor) -> None:
    """Another loss shows the predictions on images that are the target's own."""


@torch.no_grad()
def follow_(teacher: SegmentationModel, model: SegmentationModel, ema: float, it: int) -> None:
    """teacher <- a teacher + (1 - a) model with a = min(ema, 1 - 1 / (it + 1)), in place; buffers are the model's."""
    keep = min(ema, 1 - 1 / (it + 1))
    for own, other in zip(teacher.parameters(), model.parameters(), strict=True):
        own.lerp_(other, 1 - keep)
    for own, other in zip(teacher.buffers(), model.buffers(), strict=True):
        own.copy_(other)


def drawn_classes(labels: Tensor) -> Tensor:
    """labels [B, H, W] uint8 -> bool [B, H, W]: pixels of (n + 1) // 2 of the n classes of each image, drawn by torch's default generator.

    No host sync. Source: ClassMix (arXiv 2007.07936) across domains, as in DACS.
    """
    flat = labels.flatten(1).long()
    present = torch.zeros(len(labels), IGNORE + 1, dtype=torch.bool, device=labels.device).scatter_(1, flat, True)
    present[:, IGNORE] = False
    score = torch.rand(present.shape, device=labels.device).masked_fill(~present, -1.0)
    rank = score.argsort(1, descending=True).argsort(1)
    drawn = present & (rank < (present.sum(1, keepdim=True) + 1) // 2)
    return drawn.gather(1, flat).view(labels.shape)


def kept_patches(images: Tensor, ratio: float, block: int) -> Tensor:
    """images [B, 3, H, W] -> [B, 1, H, W], 1 where an image is kept: each patch of block x block pixels is taken away with probability
    `ratio`. Source: MIC.
    """
    batch, _, height, width = images.shape
    grid = (batch, 1, -(-height // block), -(-width // block))
    kept = (torch.rand(grid, device=images.device) >= ratio).to(images.dtype)
    return kept.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :height, :width]


def strong_colours(images: Tensor, strength: float) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> the same with brightness, contrast and saturation of each image changed by up to `strength`."""
    if not strength:
        return images
    low = max(0.0, 1 - strength)
    factor = torch.rand(3, len(images), 1, 1, 1, device=images.device).to(images.dtype) * (1 + strength - low) + low
    images = images * factor[0]
    images = images.mean((1, 2, 3), keepdim=True).lerp(images, factor[1])
    return images.mean(1, keepdim=True).lerp(images, factor[2]).clamp(0, 1)
