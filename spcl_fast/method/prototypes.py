"""Prototype k = mean over images of the mean unit feature of class k's correctly classified pixels in that image. Images: the source's, and
those of target.labelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..compat.spcl import load_semantic_prototype
from ..config import Config
from ..data import Dataset, eval_batches
from ..errors import CheckpointError, NumericError
from ..models import SegmentationModel
from ..ops import agreement_labels, class_moments
from ..runs import layout
from ..runs.folder import Run
from ..runs.tensorfile import read_tensors, replace_tensors
from .context import Context
from .stage import TRAIN_AGAIN


class MeanPrototypes:
    name = "prototypes"

    def sees(self, config: Config) -> tuple[int, int]:
        return config.source.size

    def write(self, context: Context, start: str | None) -> Mapping[str, Any]:
        settings = context.config.prototypes
        assert start is not None  # the catalog says from which stage
        model = context.model_of(start).eval()
        if settings.file is not None:
            found = _given(Path(settings.file), len(context.classes), model.channels)
            if distributed.is_main():
                replace_tensors(context.run.path(layout.PROTOTYPES), {"prototypes": found})
            return {}
        return self._compute(context, model, start) if distributed.is_main() else {}

    def _compute(self, context: Context, model: SegmentationModel, start: str | None) -> Mapping[str, Any]:
        settings = context.config.prototypes
        config, labelled = context.config, context.domains.labelled_target
        seen = [(context.domains.dataset("source", "train").spread(settings.images), config.source.size)]
        seen += [] if labelled is None else [(labelled, config.target.size)]
        means, images = _mean_of_image_means(context, model, seen)
        if not means.isfinite().all():
            raise NumericError(f"{self.name}: the features of the net of {start} are not finite. {TRAIN_AGAIN}")
        missing = [name for name, count in zip(context.classes.names, images.tolist(), strict=True) if not count]
        if missing:
            context.run.say(
                f"{self.name}: no correctly classified pixel of {', '.join(missing)}: their prototypes are 0"
            )
        replace_tensors(context.run.path(layout.PROTOTYPES), {"prototypes": means, "images": images})
        return {"missing": missing}


STAGE = MeanPrototypes()


def read_prototypes(run: Run) -> Tensor:
    """[K, D] float32 that this stage wrote."""
    path = run.path(layout.PROTOTYPES)
    if not path.is_file():
        raise CheckpointError(
            f"The stage {STAGE.name!r} is not finished in {run.folder}; do it first: spcl-fast {STAGE.name}."
        )
    return read_tensors(path)["prototypes"]


def _given(path: Path, num_classes: int, dim: int) -> Tensor:
    """Prototypes that somebody made before."""
    found = _prototypes_in(path) if path.suffix == ".safetensors" else load_semantic_prototype(path, num_classes)
    if found.shape != (num_classes, dim):
        raise CheckpointError(
            f"{path} holds prototypes {list(found.shape)}; this run's net and classes need {[num_classes, dim]}"
        )
    return found


def _prototypes_in(path: Path) -> Tensor:
    tensors = read_tensors(path)
    if "prototypes" not in tensors:
        raise CheckpointError(f"{path} holds {', '.join(tensors) or 'no tensor'}; expected 'prototypes' [K, D]")
    return tensors["prototypes"]


@torch.no_grad()
def _mean_of_image_means(
    context: Context, model: SegmentationModel, seen: Sequence[tuple[Dataset, tuple[int, int]]]
) -> tuple[Tensor, Tensor]:
    """seen: data sets, each with the (width, height) at which the net sees it. -> prototypes [K, D], number of images that count for each
    class [K].
    """
    workers = context.config.loop.workers
    num_classes = len(context.classes)
    total = torch.zeros(num_classes, model.channels, device=context.device)
    images = torch.zeros(num_classes, dtype=torch.int64, device=context.device)
    for image, label, _ in chain.from_iterable(eval_batches(dataset, size, workers=workers) for dataset, size in seen):
        context.stop.raise_if_requested("averaging prototypes")
        features, logits = model(image.to(context.device))
        label = torch.from_numpy(label).to(context.device)[None]
        moments = class_moments(features, agreement_labels(label, logits.argmax(1)), num_classes)
        total += moments.sums / moments.counts.clamp_min(1)[:, None]
        images += moments.counts > 0
    return total / images.clamp_min(1)[:, None], images
