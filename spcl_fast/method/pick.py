"""Which of the target's training images are worth a label: those that a trained net is least sure of, and that differ from each other.

Greedy k-centre selection (Sener and Savarese, arXiv 1708.00489) with distances weighted by uncertainty. An image is its mean unit feature
of each predicted class, times the class's share of the pixels; its uncertainty is the mean entropy of its pixels over ln K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Config
from ..data import Dataset, eval_batches
from ..errors import ConfigError, DataError
from ..ops import class_moments
from ..runs import layout
from .domains import Domains
from .trained import Trained, load_trained

_DIM = 64  # wider features are projected to it, by the same random matrix for every image: distances stay
_SAID_EVERY = 50


class Picked(NamedTuple):
    names: list[str]  # the most useful one first
    labelled: list[str]  # those of target.labelled


def pick_images(
    path: Path, config: Config, stage: str | None, count: int, say: Callable[[str], None] = print
) -> Picked:
    """`count` training images of the target. Reads no label.

    path: a run folder or weights, as `load_trained` takes them. Images of target.labelled and of the validation split are not picked; those
    of target.labelled count as picked before. Memory: of each image K x 64 floats. Raises DataError where fewer than `count` are left.
    """
    if layout.is_exported(path):
        raise ConfigError(f"{path} is an exported net, which gives no features. Give the run folder that it came from.")
    trained, domains = load_trained(path, config, stage), Domains(config)
    every = domains.dataset("target", "train", labels=False)
    if every.classes.names != trained.classes.names:
        raise ConfigError(
            f"{trained.weights} was trained for other classes than those of {every.kind} {config.target.root}"
        )
    labelled = [] if domains.named_target is None else domains.named_target.names
    open_ = [index for index in _not_evaluated(domains, every) if every.names[index] not in labelled]
    if len(open_) < count:
        raise DataError(f"--count {count}: only {len(open_)} training images of the target are not labelled yet")
    known = [index for index, name in enumerate(every.names) if name in labelled]
    seen = every.select(open_ + known)
    uncertainty, places = _seen_by(trained, seen, config, say)
    picked = greedy(uncertainty, places, count, before=range(len(open_), len(seen)))
    return Picked([seen.names[index] for index in picked], labelled)


def greedy(uncertainty: Tensor, places: Tensor, count: int, before: Sequence[int] = ()) -> list[int]:
    """uncertainty [N], places [N, C] -> `count` indices. Each is the one with the largest uncertainty x distance to the nearest that was
    picked or is in `before`; the first one, where nothing is before it, the most uncertain. Equal ones: the lowest index.
    """
    nearest = torch.full((len(places),), math.inf)
    taken = torch.zeros(len(places), dtype=torch.bool)
    picked: list[int] = []

    def take(index: int) -> None:
        taken[index] = True
        torch.minimum(nearest, (places - places[index]).norm(dim=1), out=nearest)

    for index in before:
        take(index)
    while len(picked) < count:
        score = uncertainty * (nearest if taken.any() else 1.0)
        index = int(torch.where(taken, -1.0, score).argmax())
        picked.append(index)
        take(index)
    return picked


def _not_evaluated(domains: Domains, every: Dataset) -> list[int]:
    paths = domains.evaluated_paths()
    return [index for index in range(len(every)) if str(every.image_path(index)) not in paths]


@torch.no_grad()
def _seen_by(trained: Trained, images: Dataset, config: Config, say: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """-> uncertainty [N] from 0 to 1, places [N, K * dim], of every image."""
    num_classes = len(trained.classes)
    uncertainty, places = torch.empty(len(images)), []
    projection: Tensor | None = None
    batches = eval_batches(images, config.target.eval_size, workers=config.loop.workers, labels=False)
    for index, (image, _, _) in enumerate(batches):
        features, logits = trained.model(image.to(trained.device))
        log_p = logits.float().log_softmax(1)
        entropy = -(log_p.exp() * log_p).sum(1).mean() / math.log(max(2, num_classes))
        uncertainty[index] = entropy.cpu()
        sums = class_moments(features, logits.argmax(1), num_classes).sums.cpu() / logits[0, 0].numel()
        if projection is None and sums.shape[1] > _DIM:
            generator = torch.Generator().manual_seed(0)
            projection = torch.randn(sums.shape[1], _DIM, generator=generator) / math.sqrt(_DIM)
        places.append((sums if projection is None else sums @ projection).flatten())
        if (index + 1) % _SAID_EVERY == 0:
            say(f"{index + 1} of {len(images)} images")
    if not uncertainty.isfinite().all():
        raise DataError(
            f"the logits of {trained.weights} are not finite on {images.names[int(uncertainty.isnan().int().argmax())]}"
        )
    return uncertainty, torch.stack(places)
