"""What a frozen encoder makes of augmented training images and of evaluated ones: two maps an image, computed once, kept on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.adaptation.plan import recipe
from spcl_fast.config import AugmentConfig, Config
from spcl_fast.data import Dataset, eval_batches, train_batches
from spcl_fast.method.context import Context
from spcl_fast.method.nets import Nets
from spcl_fast.models import SegmentationModel
from spcl_fast.models.lite import LiteFeatures
from spcl_fast.runs.identity import settings_sha256, step_seed

SOURCE_VIEWS = 3200
TARGET_VIEWS = 656
LABELLED_VIEWS = 240  # of the images of target.labelled
_BATCH = 8
Images = Iterator[tuple[Tensor, np.ndarray, list[str]]]  # images [B, 3, H, W], labels [B, H, W], names


class Views(NamedTuple):
    """A row for each view: maps at stride 8 and 16, float16, and true labels, uint8, which training reads of the source alone."""

    skip: np.ndarray
    deep: np.ndarray
    labels: np.ndarray
    names: np.ndarray  # of the images

    def maps(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = rows.numpy()
        return torch.from_numpy(self.skip[chosen]).float(), torch.from_numpy(self.deep[chosen]).float()

    def labels_of(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.labels[rows.numpy()])


class Domains(NamedTuple):
    source: Views
    target: Views
    evaluated: Views
    labelled: Views | None  # of the images of target.labelled, if any


def views_of(config: Config, folder: Path) -> Domains:
    """Those of a pair of domains; but for the choice of labelled images whatever the seed. Parts that recipes have in common are shared.

    config: one of a plan; its net must be an EfficientNet-Lite, its target's validation labels of one size.
    """
    context, train, few = Context(config), config.adapt, config.target.labelled
    model = Nets(config, len(context.classes), context.device, context.precision).new().eval()
    domains = context.domains

    def part(what: str, images: Callable[[], Images], *keys: str, more: object = None) -> Views:
        known = {key: value for key, value in recipe(config).items() if key.startswith(("model.", *keys))}
        known.pop("target.labelled", None)
        name = settings_sha256({**known, "what": what, "more": more})[:12]
        return _kept(folder / f"{what}-{name}", model, images)

    def trained_on(side: str, augment: AugmentConfig, count: int, dataset: Dataset | None = None) -> Images:
        chosen = domains.dataset(side, "train") if dataset is None else dataset
        return _training(chosen, augment, getattr(config, side).size, count)

    return Domains(
        part("source", lambda: trained_on("source", train.augment, SOURCE_VIEWS), "source.", "adapt.augment."),
        part(
            "target",
            lambda: trained_on("target", train.target_augment, TARGET_VIEWS),
            "target.",
            "adapt.target_augment.",
        ),
        part("evaluated", lambda: _evaluated(context), "target."),
        None
        if few is None
        else part(
            "labelled",
            lambda: trained_on("target", train.augment, LABELLED_VIEWS, domains.labelled_target),
            "target.",
            "adapt.augment.",
            more=[few, config.seed],
        ),
    )


def _training(dataset: Dataset, augment: AugmentConfig, size: tuple[int, int], count: int) -> Images:
    batches = train_batches(dataset, augment, size=size, batch_size=_BATCH, seed=step_seed(0, "study/views", 0))
    for _ in range(count // _BATCH):
        batch = next(batches)
        yield batch.images, batch.labels.numpy(), batch.names


def _evaluated(context: Context) -> Images:
    assert context.evaluation_data is not None
    for image, label, name in eval_batches(context.evaluation_data, context.config.target.eval_size):
        yield image, np.asarray(label)[None], [name]


@torch.no_grad()
def _kept(stem: Path, model: SegmentationModel, make: Callable[[], Images]) -> Views:
    paths = [stem.with_name(f"{stem.name}-{part}.npy") for part in Views._fields]
    if not all(path.is_file() for path in paths):
        encoder = model.feature_extractor
        assert isinstance(encoder, LiteFeatures)
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path, array in zip(paths, _computed(model, encoder, make()), strict=True):
            half = path.with_suffix(".half.npy")
            np.save(half, array)
            half.replace(path)
    return Views(*(np.load(path, mmap_mode="r") for path in paths))


def _computed(model: SegmentationModel, body: LiteFeatures, images: Images) -> list[np.ndarray]:
    rows: list[tuple[np.ndarray, ...]] = []
    for batch, labels, names in images:
        normal = (batch - model.mean) / model.std
        skip, deep = body.encoder(normal.contiguous(memory_format=torch.channels_last))
        rows.append((skip.half().numpy(), deep.half().numpy(), labels, np.array(names)))
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]
