"""One iteration of each trained stage: forward, losses, backward, one domain after the other, so that one graph is alive at once.

A step is a function of the nets, the batch and the iteration alone, without files or data sets: `plan` runs the same code on tensors that
hold nothing. With `accumulate` > 1 a batch goes through in parts. A loss is a mean over the labelled pixels of the whole batch, so a part's
mean is weighted by its share of them; the prototypes move once, by the whole batch, before any contrastive loss: with fixed BatchNorm the
gradient is that of the undivided batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AdaptConfig, DistillConfig, TrainConfig, WarmupConfig
from ..estimators.bank import PrototypeBank
from ..models import Discriminator
from ..models.chain import statistics_kept
from ..ops import agreement_labels, labels_on, prototype_contrastive_loss, upsampled_cross_entropy
from ..train import memory
from ..train.lean import LeanModel

if TYPE_CHECKING:
    from ..data import Batch  # at run time any dataclass with images, labels, names: steps need no reader of files

Step = Callable[[Any, int], dict[str, Tensor]]
Look = Callable[[Tensor], None]  # is given logits [B, K, h, w] on the way
Shown = Callable[[int], bool]  # whether diagnostics belong to the values of this iteration
IGNORE = 255


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """The batch as `count` batches of equally many images; views, nothing is copied."""
    if count == 1:
        return [batch]
    each = len(batch.images) // count
    slices = [slice(i * each, (i + 1) * each) for i in range(count)]
    return [
        dataclasses.replace(batch, images=batch.images[s], labels=batch.labels[s], names=batch.names[s]) for s in slices
    ]


def shares(labels: Sequence[Tensor], class_weight: Tensor | None = None) -> list[Tensor | float]:
    """What each part's mean counts for in the mean over all: its share of the labelled pixels, or of their summed class weights."""
    if len(labels) == 1:
        return [1.0]
    counts = [_weight_of(part, class_weight) for part in labels]
    total = sum(counts[1:], counts[0]).clamp_min(torch.finfo(torch.float32).tiny)
    return [count / total for count in counts]


def _weight_of(labels: Tensor, class_weight: Tensor | None) -> Tensor:
    labelled = labels != IGNORE
    if class_weight is None:
        return labelled.sum(dtype=torch.float32)
    counts = torch.stack([(labels == k).sum() for k in range(len(class_weight))])
    return (counts * class_weight).sum()


def backward(loss: Tensor) -> None:
    with memory.phase("backward"):
        loss.backward()


def total(values: Sequence[Tensor]) -> Tensor:
    """The value over the whole batch: the parts are weighted already."""
    return sum(values[1:], values[0])


# ---- supervised, distill -------------------------------------------------------------------------------------------------------------


def segmentation_pass(
    net: LeanModel,
    batch: Batch,
    accumulate: int,
    *,
    temperature: float,
    class_weight: Tensor | None,
    weight: float = 1.0,
    look: Look = lambda logits: None,
) -> Tensor:
    """Cross-entropy of a batch, gone backward. -> its value. `look` is shown the logits of every part."""
    parts, values = parts_of(batch, accumulate), []
    for part, share in zip(parts, shares([part.labels for part in parts], class_weight), strict=True):
        _, logits = net(part.images)
        with memory.phase("loss"):
            look(logits.detach())
            loss = share * upsampled_cross_entropy(
                logits, part.labels, temperature=temperature, class_weight=class_weight
            )
        backward(weight * loss)
        values.append(loss.detach())
    return total(values)


def supervised_step(net: LeanModel, train: TrainConfig, class_weight: Tensor | None, accumulate: int = 1) -> Step:
    def step(batch: Batch, it: int) -> dict[str, Tensor]:
        return {
            "segmentation": segmentation_pass(
                net, batch, accumulate, temperature=train.temperature, class_weight=class_weight
            )
        }

    return step


def distill_step(
    net: LeanModel,
    train: DistillConfig,
    class_weight: Tensor | None,
    accumulate: int = 1,
    shown: Shown = lambda it: False,
) -> Step:
    """Cross-entropy on target against its pseudo-labels; with `source_weight` on source, too."""

    def step(batch: Batch | tuple[Batch, Batch], it: int) -> dict[str, Tensor]:
        source, target = batch if train.source_weight else (None, batch)
        values: dict[str, Tensor] = {}
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


# ---- warm-up -------------------------------------------------------------------------------------------------------------------------


def warmup_step(
    net: LeanModel,
    discriminator: Discriminator,
    train: WarmupConfig,
    class_weight: Tensor | None,
    accumulate: int = 1,
    shown: Shown = lambda it: False,
) -> Step:
    """AdaptSegNet, single level: a discriminator on the softmax maps tells the domains apart, the net learns to fool it on target."""

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

    def step(batch: tuple[Batch, Batch], it: int) -> dict[str, Tensor]:
        sources, targets = (parts_of(domain, accumulate) for domain in batch)
        values: dict[str, Tensor] = {}
        look = share_into(values, shown(it))
        rows = [
            one(*row, look)
            for row in zip(sources, targets, shares([s.labels for s in sources], class_weight), strict=True)
        ]
        losses = zip(("segmentation", "adversarial", "discriminator"), map(total, zip(*rows, strict=True)), strict=True)
        return values | dict(losses)

    return step


def softmax_maps(logits: Tensor, images: Tensor) -> Tensor:
    """The discriminator's input, at the images' size as in the release."""
    return F.interpolate(logits.float(), images.shape[2:], mode="bilinear", align_corners=True).softmax(1)


# ---- adapt ---------------------------------------------------------------------------------------------------------------------------


def adapt_step(
    net: LeanModel,
    bank: PrototypeBank,
    train: AdaptConfig,
    class_weight: Tensor | None,
    accumulate: int = 1,
    shown: Shown = lambda it: False,
) -> Step:
    """Segmentation loss on source; contrastive loss of both domains against the prototypes, which follow the source.

    Diagnostics take the target classifier forward that training does without (of the last part where there are several).
    """
    num_classes = bank.prototypes.shape[0]

    def contrast(features: Tensor, labels: Tensor) -> Tensor:
        return prototype_contrastive_loss(
            features, labels, bank.prototypes, temperature=train.contrast_temperature, normalize=train.normalize
        )

    def source_pass(source: Batch) -> tuple[Tensor, Tensor]:
        parts = parts_of(source, accumulate)
        agreements = _move_prototypes_first(net, bank, parts) if accumulate > 1 else [None]
        share_of_labels = shares([part.labels for part in parts], class_weight)
        share_of_agreed = shares(agreements)
        segmentations, contrasts = [], []
        for part, agreed, share, contrast_share in zip(
            parts, agreements, share_of_labels, share_of_agreed, strict=True
        ):
            features, logits = net(part.images)
            with memory.phase("loss"):
                if agreed is None:
                    agreed = agreement_labels(part.labels, logits.argmax(1))
                    bank.update_(features.detach(), agreed)
                segmentation = share * upsampled_cross_entropy(
                    logits, part.labels, temperature=train.temperature, class_weight=class_weight
                )
                pull = contrast_share * contrast(features, agreed)
                loss = segmentation + train.contrast_weight * pull
            del features, logits  # the graph frees them as soon as its backward is past them
            backward(loss)
            segmentations.append(segmentation.detach())
            contrasts.append(pull.detach())
        return total(segmentations), total(contrasts)

    def target_pass(target: Batch, it: int) -> tuple[Tensor, dict[str, Tensor]]:
        parts, contrasts = parts_of(target, accumulate), []
        grids = [labels_on(part.labels, net.grid(part.images)) for part in parts] if accumulate > 1 else [None]
        for part, share in zip(parts, shares(grids), strict=True):
            features = net.features(part.images)
            with memory.phase("loss"):
                pull = share * contrast(features, part.labels)
                loss = train.contrast_weight * pull
            features = features.detach() if shown(it) else None
            backward(loss)
            contrasts.append(pull.detach())
        return total(contrasts), {} if features is None else diagnostics(net, features, parts[-1].labels, bank)

    def step(batch: tuple[Batch, Batch], it: int) -> dict[str, Tensor]:
        source, target = batch
        segmentation, source_contrast = source_pass(source)
        target_contrast, more = target_pass(target, it)
        chance = math.log(num_classes)  # at a high temperature the loss itself says nothing: log what is above ln K
        values = {
            "segmentation": segmentation,
            "source_excess": source_contrast - chance,
            "target_excess": target_contrast - chance,
        }
        return values | more

    return step


@torch.no_grad()
def _move_prototypes_first(net: LeanModel, bank: PrototypeBank, parts: list[Batch]) -> list[Tensor]:
    """A forward of every part only to move the prototypes by the whole batch; costs one source forward. -> the parts' agreement labels."""
    agreements, sums, counts = [], 0, 0
    with statistics_kept(net.model):
        for part in parts:
            features, logits = net(part.images)
            agreements.append(agreement_labels(part.labels, logits.argmax(1)))
            own = bank.moments(features, agreements[-1])
            sums, counts = sums + own[0], counts + own[1]
    bank.move_(sums, counts)
    return agreements


@torch.no_grad()
def diagnostics(net: LeanModel, features: Tensor, labels: Tensor, bank: PrototypeBank) -> dict[str, Tensor]:
    """What shows a collapse while the loss still falls: predicted and kept shares of each class on target, length of each prototype, and
    its cosine to the nearest other one.
    """
    num_classes = bank.prototypes.shape[0]
    with memory.phase("loss"):
        kept = F.one_hot(labels.long().clamp_max(num_classes), num_classes + 1).float().mean((0, 1, 2))[:num_classes]
        unit = F.normalize(bank.prototypes.float(), dim=1)
        nearest = (unit @ unit.T).fill_diagonal_(-1.0).amax(1)
        return {
            "predicted_share": predicted_share(net.classify(features)),
            "kept_share": kept,
            "prototype_norm": bank.prototypes.norm(dim=1),
            "prototype_nearest": nearest,
        }


def predicted_share(logits: Tensor) -> Tensor:
    """[B, K, h, w] -> share of the pixels predicted as each class, [K]."""
    return F.one_hot(logits.argmax(1), logits.shape[1]).float().mean((0, 1, 2))


def share_into(values: dict[str, Tensor], wanted: bool) -> Look:
    """Puts the predicted shares of the logits it is given last among a step's values."""
    return (lambda logits: values.update(predicted_share=predicted_share(logits))) if wanted else (lambda logits: None)
