"""AdaptSegNet, single level: a discriminator on the softmax maps tells the domains apart, the net learns to fool it on target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config, WarmupConfig
from ..data import Batch
from ..models import Discriminator
from ..ops import upsampled_cross_entropy
from ..train import memory
from ..train.lean import LeanModel
from ..train.meter import Values, Weighted
from .nets import Nets
from .parts import Look, Shown, Step, backward, is_labelled, never, parts_of, share_into, shares, total
from .stage import NONE, OWN, Feed, Trainee, forward_shapes


class Warmup:
    name = "warmup"

    def feeds(self, config: Config) -> tuple[Feed, ...]:
        augment = config.warmup.augment
        return Feed("source", OWN, augment), Feed("target", NONE, augment)

    def build(self, config: Config, nets: Nets) -> Trainee:
        train = config.warmup
        model = nets.start()
        torch.manual_seed(config.seed)
        discriminator = nets.place(Discriminator(nets.num_classes))
        class_weight = nets.class_weight("source", train.class_weight_power)
        net = nets.lean(model, forward_shapes(config, train, self.feeds(config)))
        step = warmup_step(net, discriminator, train, class_weight, config.loop.accumulate, nets.shown(train))
        adam = torch.optim.Adam(discriminator.parameters(), lr=train.discriminator_lr, betas=(0.9, 0.99))
        return Trainee(
            step,
            net,
            {"model": model, "discriminator": discriminator},
            {"model": nets.optimizer(model, train), "discriminator": adam},
        )


STAGE = Warmup()


def warmup_step(
    net: LeanModel,
    discriminator: Discriminator,
    train: WarmupConfig,
    class_weight: Tensor | None,
    accumulate: int = 1,
    shown: Shown = never,
) -> Step:
    def verdict_loss(maps: Tensor, is_source: bool) -> Tensor:
        verdict = discriminator(maps)
        return F.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, float(is_source)))

    def one(source: Batch, target: Batch, share: Tensor | float, look: Look) -> tuple[Tensor, ...]:
        _, logits = net(source.images)
        with memory.phase("loss"):
            segmentation = share * upsampled_cross_entropy(
                logits, source.labels, temperature=train.temperature, class_weight=class_weight
            )
        backward(segmentation)
        logits = logits.detach()
        with memory.phase("loss"):
            source_maps = softmax_maps(logits / train.temperature, source.images)

        _, logits = net(target.images)
        with memory.phase("loss"):
            look(logits.detach())
            target_maps = softmax_maps(logits, target.images)
            discriminator.requires_grad_(False)
            adversarial = verdict_loss(target_maps, is_source=True) / accumulate
        backward(train.adversarial_weight * adversarial)

        discriminator.requires_grad_(True)
        with memory.phase("loss"):
            discrimination = 0.5 * verdict_loss(source_maps, is_source=True) + 0.5 * verdict_loss(
                target_maps.detach(), is_source=False
            )
        backward(discrimination / accumulate)
        return segmentation.detach(), adversarial.detach(), discrimination.detach() / accumulate

    def step(batch: tuple[Batch, Batch], it: int) -> Values:
        sources, targets = (parts_of(domain, accumulate) for domain in batch)
        values: dict[str, Tensor] = {}
        look = share_into(values, shown(it))
        rows = [
            one(*row, look)
            for row in zip(sources, targets, shares([s.labels for s in sources], class_weight), strict=True)
        ]
        losses = zip(("segmentation", "adversarial", "discriminator"), map(total, zip(*rows, strict=True)), strict=True)
        values = values | dict(losses)
        return {**values, "segmentation": Weighted(values["segmentation"], is_labelled(batch[0]))}

    return step


def softmax_maps(logits: Tensor, images: Tensor) -> Tensor:
    """The discriminator's input, at the images' size as in the release."""
    return F.interpolate(logits.float(), images.shape[2:], mode="bilinear", align_corners=True).softmax(1)
