"""Which of its class's M rows a pixel belongs to: scores against its own class alone, and Sinkhorn within each class.

A class's pixels are spread evenly over its rows. Everything is of size [N, M]: neither the [N, K M] scores nor a class's features are there
as a whole. No host sync, and the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.pixels import labels_of, pixels_of

NONE = -1  # the row of a pixel without a label: rows may be more than 255
_BLOCK = 1 << 22  # scores of all rows that are there at a time


class ClassRows(NamedTuple):
    """Rows of all classes, in the order of classes, as the losses take them."""

    prototypes: Tensor  # [K M, D]
    variances: Tensor | None = None  # [K M, D]
    bias: Tensor | None = None  # [K M]


class LabelledGrid(NamedTuple):
    """Features as [B, D, h, w] and their labels on that grid."""

    features: Tensor
    labels: Tensor  # [B, h, w] int64, NONE where ignored
    grid: tuple[int, ...]  # of the features as they were given


def labelled_grid(name: str, features: Tensor, labels: Tensor, ignore_index: int) -> LabelledGrid:
    pixels = pixels_of(name, features)
    values = ops.labels_on(labels_of(name, pixels, labels), pixels.features.shape[2:]).long()
    return LabelledGrid(pixels.features.detach(), values.masked_fill(values == ignore_index, NONE), pixels.grid)


def predictions_on(name: str, given: LabelledGrid, predictions: Tensor) -> Tensor:
    """The predictions, which must have the features' grid."""
    if tuple(predictions.shape) != given.grid:
        raise ValueError(
            f"{name}: predictions must have the features' grid {list(given.grid)}, got shape {list(predictions.shape)}"
        )
    return predictions.reshape(-1)


_row_classes: dict[tuple[int, int, str], Tensor] = {}


def row_classes(num_classes: int, per_class: int, like: Tensor) -> Tensor:
    """[K M] on the device of `like`: the class of each row.

    Always the same tensor: an op looks at its values, and on a GPU waits for them, once per tensor. Not where `like` has no values.
    """
    key = num_classes, per_class, str(like.device)
    is_traced = torch.compiler.is_compiling() or isinstance(like, torch._subclasses.FakeTensor)
    found = None if is_traced else _row_classes.get(key)
    if found is None:
        found = torch.arange(num_classes, device=like.device).repeat_interleave(per_class)
        if not is_traced and not found.is_inference():
            _row_classes[key] = found
    return found


@torch.no_grad()
def own_scores(given: LabelledGrid, rows: ClassRows, per_class: int, *, normalize: bool = True) -> Tensor:
    """[B, M, h, w]: each pixel's scores (temperature 1) against the rows of its own class; 0 where it has no label."""
    features, labels, _ = given
    found = features.new_zeros(len(features), per_class, *features.shape[2:], dtype=_wide(features))
    for image, lines in _blocks(features, len(rows.prototypes)):
        scores = ops.prototype_logits(
            features[image : image + 1, :, lines], rows.prototypes, temperature=1.0, normalize=normalize, bias=rows.bias,
            variances=rows.variances,
        )  # fmt: skip
        by_class = scores[0].view(-1, per_class, *scores.shape[2:])  # [K, M, lines, w]
        own = labels[image, lines].clamp(0, len(by_class) - 1)
        chosen = by_class.gather(0, own[None, None].expand(1, per_class, *own.shape))[0]
        found[image, :, lines] = chosen.masked_fill(labels[image, lines] == NONE, 0)
    return found


def _blocks(features: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    height, width = features.shape[2:]
    lines = max(1, _BLOCK // max(1, rows * width))
    for image in range(len(features)):
        for first in range(0, height, lines):
            yield image, slice(first, first + lines)


class Assignment(NamedTuple):
    probabilities: Tensor  # [B, M, h, w], over the rows of a pixel's own class
    labels: Tensor  # [B, h, w]: the classes, NONE where a pixel has none or its scores are not finite

    def rows(self, chosen: Tensor | None = None) -> Tensor:
        """[B, h, w]: the row m K + index of `chosen` [B, h, w], by default of the likeliest (the first of equals); NONE without a label."""
        chosen = self.probabilities.argmax(1) if chosen is None else chosen
        found = self.labels * self.probabilities.shape[1] + chosen
        return found.masked_fill(self.labels == NONE, NONE)


@torch.no_grad()
def balanced_assignment(
    scores: Tensor, labels: Tensor, num_classes: int, *, epsilon: float = 0.05, iterations: int = 3
) -> Assignment:
    """Sinkhorn within each class, in the log domain: columns (rows of a class) to equal shares, then pixels to 1, `iterations` times.

    scores [B, M, h, w] against the own class, divided by `epsilon` here; labels [B, h, w], NONE where there is none. A pixel whose scores
    are not finite is left out. Source: Cuturi, NeurIPS 2013; `distributed_sinkhorn` of SwAV, which ProtoSeg and GMMSeg use per class.
    """
    labels = labels.masked_fill(~scores.isfinite().all(1), NONE)
    scores = torch.where((labels != NONE)[:, None], scores, 0) / epsilon
    pixels = torch.zeros_like(scores[:, :1])
    for _ in range(iterations):
        columns = _class_logsumexp(scores + pixels, labels, num_classes)
        balanced = scores - _of_class(columns, labels)
        pixels = -balanced.logsumexp(1, keepdim=True)
    return Assignment((balanced + pixels).exp(), labels)


def _class_logsumexp(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[K, M]: over the pixels of each class; 0 for a class without any."""
    largest = class_max(values, labels, num_classes)
    shifted = (values - _of_class(largest, labels)).exp()
    sums = ops.class_moments(shifted, labels, num_classes, normalize=False, ignore_index=NONE).sums.to(values.dtype)
    return torch.where(sums > 0, sums.log() + largest, 0)


def class_max(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[K, M]: the largest of values [B, M, h, w] over the pixels of each class; 0 for a class without any."""
    flat = values.movedim(1, -1).flatten(0, 2)
    home = labels.flatten().masked_fill(labels.flatten() == NONE, num_classes)[:, None].clamp(0, num_classes)
    found = flat.new_full((num_classes + 1, flat.shape[1]), -torch.inf)
    found = found.scatter_reduce(0, home.expand_as(flat), flat, "amax")[:num_classes]
    return torch.where(found.isfinite(), found, 0)


def _of_class(by_class: Tensor, labels: Tensor) -> Tensor:
    """[K, M] -> [B, M, h, w], the row of each pixel's class."""
    return by_class[labels.clamp(0, len(by_class) - 1)].movedim(-1, 1)


def _wide(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32
