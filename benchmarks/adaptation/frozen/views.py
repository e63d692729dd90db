"""What a frozen encoder makes of augmented training images and of evaluated ones: two maps an image, computed once, kept on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.adaptation.plan import recipe_sha256
from spcl_fast.config import AugmentConfig, Config
from spcl_fast.data import eval_batches, train_batches
from spcl_fast.method.context import Context
from spcl_fast.method.nets import Nets
from spcl_fast.models import SegmentationModel
from spcl_fast.models.lite import LiteFeatures
from spcl_fast.runs.identity import step_seed

SOURCE_VIEWS = 3200
TARGET_VIEWS = 656
_BATCH = 8


class Views(NamedTuple):
    """A row for each view: maps at stride 8 and 16, float16, and true labels, uint8, which training reads of the source alone."""

    skip: np.ndarray
    deep: np.ndarray
    labels: np.ndarray

    def maps(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = rows.numpy()
        return torch.from_numpy(self.skip[chosen]).float(), torch.from_numpy(self.deep[chosen]).float()

    def labels_of(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.labels[rows.numpy()])


class Domains(NamedTuple):
    source: Views
    target: Views
    evaluated: Views


def views_of(config: Config, folder: Path) -> Domains:
    """Those of a pair of domains, whatever the seed. config: one of a plan; its net must be an EfficientNet-Lite, its target's validation
    labels of one size."""
    name = recipe_sha256(config)[:12]
    context, train = Context(config), config.adapt
    model = Nets(config, len(context.classes), context.device, context.precision).new().eval()
    wanted = {
        "source": lambda: _training(context, "source", train.augment, SOURCE_VIEWS),
        "target": lambda: _training(context, "target", train.target_augment, TARGET_VIEWS),
        "evaluated": lambda: _evaluated(context),
    }
    return Domains(*(_kept(folder / f"{name}-{what}", model, make) for what, make in wanted.items()))


def _training(context: Context, side: str, augment: AugmentConfig, count: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    dataset, size = context.domains.dataset(side, "train"), getattr(context.config, side).size
    batches = train_batches(dataset, augment, size=size, batch_size=_BATCH, seed=step_seed(0, f"views/{side}", 0))
    for _ in range(count // _BATCH):
        batch = next(batches)
        yield batch.images, batch.labels.numpy()


def _evaluated(context: Context) -> Iterator[tuple[Tensor, np.ndarray]]:
    assert context.evaluation_data is not None
    for image, label, _ in eval_batches(context.evaluation_data, context.config.target.eval_size):
        yield image, np.asarray(label)[None]


@torch.no_grad()
def _kept(stem: Path, model: SegmentationModel, make: Callable[[], Iterator[tuple[Tensor, np.ndarray]]]) -> Views:
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


def _computed(
    model: SegmentationModel, body: LiteFeatures, images: Iterable[tuple[Tensor, np.ndarray]]
) -> list[np.ndarray]:
    rows: list[tuple[np.ndarray, ...]] = []
    for batch, labels in images:
        normal = (batch - model.mean) / model.std
        skip, deep = body.encoder(normal.contiguous(memory_format=torch.channels_last))
        rows.append((skip.half().numpy(), deep.half().numpy(), labels))
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]
