"""What the steps of the trained stages are made of: parts of a batch, one domain's forward and backward, what is logged on the way.

A step is a function of the nets, the batch and the iteration alone, without files or data sets: the memory plan runs the same code on
tensors that hold nothing. One domain goes after the other, so that one graph is alive at once. With `accumulate` > 1 a batch goes through
in parts. A loss is a mean over the labelled pixels of the whole batch, so a part's mean is weighted by its share of them: with fixed
BatchNorm the gradient is that of the undivided batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Batch
from ..data.classes import IGNORE
from ..ops import upsampled_cross_entropy
from ..train import memory
from ..train.lean import LeanModel
from ..train.loop import Step as Step  # for the files of the stages
from ..train.meter import Weighted

Look = Callable[[Tensor], None]  # is given logits [B, K, h, w] on the way
Beside = Callable[[Batch], Tensor]  # a part, after its forward -> what is added to its loss
Shown = Callable[[int], bool]  # whether diagnostics belong to the values of this iteration


def never(it: int) -> bool:
    return False


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """The batch as `count` batches of equally many images; views, nothing is copied."""
    if count == 1:
        return [batch]
    each = len(batch.images) // count
    slices = [slice(i * each, (i + 1) * each) for i in range(count)]
    return [
        dataclasses.replace(batch, images=batch.images[s], labels=batch.labels[s], names=batch.names[s]) for s in slices
    ]


def shares(labels: Sequence[Tensor | None], class_weight: Tensor | None = None) -> list[Tensor | float]:
    """What each part's mean counts for in the mean over all: its share of the labelled pixels, or of their summed class weights.

    Labels are needed of several parts only.
    """
    if len(labels) == 1:
        return [1.0]
    counts = [_weight_of(part, class_weight) for part in labels if part is not None]
    whole = sum(counts[1:], counts[0]).clamp_min(torch.finfo(torch.float32).tiny)
    return [count / whole for count in counts]


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


def segmentation_pass(
    net: LeanModel,
    batch: Batch,
    accumulate: int,
    *,
    temperature: float,
    class_weight: Tensor | None,
    weight: float = 1.0,
    look: Look = lambda logits: None,
    beside: Beside | None = None,
) -> Weighted:
    """Cross-entropy of a batch and its backward. -> its value, which counts where a pixel is labelled. `look` is shown the logits of every
    part.
    """
    parts, values = parts_of(batch, accumulate), []
    for part, share in zip(parts, shares([part.labels for part in parts], class_weight), strict=True):
        _, logits = net(part.images)
        with memory.phase("loss"):
            look(logits.detach())
            loss = share * upsampled_cross_entropy(
                logits, part.labels, temperature=temperature, class_weight=class_weight
            )
        backward(weight * loss if beside is None else weight * loss + beside(part))
        values.append(loss.detach())
    return Weighted(total(values), is_labelled(batch))


def is_labelled(batch: Batch) -> Tensor:
    """Whether any pixel of it is, 0-dim: the loss of a batch without a label is 0, which is no figure."""
    return (batch.labels != IGNORE).any()


def predicted_share(logits: Tensor) -> Tensor:
    """[B, K, h, w] -> share of the pixels predicted as each class, [K]."""
    return F.one_hot(logits.argmax(1), logits.shape[1]).float().mean((0, 1, 2))


def share_into(values: dict[str, Tensor] | dict[str, Tensor | Weighted], wanted: bool) -> Look:
    """Puts the predicted shares of the logits it is given last among a step's values."""
    return (lambda logits: values.update(predicted_share=predicted_share(logits))) if wanted else (lambda logits: None)
