"""Parts of a source image pasted onto a target image, labels too: what is rare in the pseudo-labels comes with a sure label and in the
target's surroundings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch

from .classes import IGNORE
from .loading import Batch
from .sampling import generator

_MIX = 4  # stream of random numbers; sampling has the ones before


def class_mixed(source: Batch, target: Batch, probability: float, rng: np.random.Generator) -> Batch:
    """`target` with half of the classes of its partner in `source` pasted over it, each image with `probability`. Inputs stay as they are.

    Of n classes present (n + 1) // 2 are drawn, at random; unlabelled source pixels are never pasted. images [B, 3, H, W], labels
    [B, H, W], of the same size in both. Copies the target batch once. Source: ClassMix (arXiv 2007.07936) across domains, as in DACS
    (arXiv 2007.08702, section 3).
    """
    images, labels = target.images.clone(), target.labels.clone()
    for row in range(len(images)):
        if rng.random() >= probability:
            continue
        present = source.labels[row].unique()
        present = present[present != IGNORE]
        drawn = rng.permutation(len(present))[: (len(present) + 1) // 2]
        pasted = torch.isin(source.labels[row], present[torch.from_numpy(drawn)])
        images[row] = torch.where(pasted, source.images[row], images[row])
        labels[row] = torch.where(pasted, source.labels[row], labels[row])
    return dataclasses.replace(target, images=images, labels=labels)


def with_class_mix(
    pairs: Callable[[int], Iterator[tuple[Batch, Batch]]], probability: float, *, seed: int, rank: int = 0
) -> Callable[[int], Iterator[tuple[Batch, Batch]]]:
    """start -> the same pairs (source, target) from that iteration on, the target mixed. A function of (seed, iteration, rank)."""

    def mixed(start: int) -> Iterator[tuple[Batch, Batch]]:
        for it, (source, target) in enumerate(pairs(start), start):
            yield source, class_mixed(source, target, probability, generator(seed, _MIX, it, rank))

    return mixed
