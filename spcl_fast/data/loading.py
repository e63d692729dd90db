"""Batches: training ones without end, evaluation ones in order.

Batch t of rank r is a pure function of (seed, t, r): every random number comes from a generator keyed by (seed, step, slot), with worker
processes or without. A run that starts at step s yields bit for bit what an uninterrupted run yields from s on.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ..config import AugmentConfig
from ..errors import DataError
from .augment import check_augment, make_sample, output_size
from .cache import CACHE
from .dataset import Dataset, Problem
from .sampling import BalancedOrder, Order, ShuffledOrder, generator
from .statistics import class_presence, note_problem, rarity

_AUGMENT = 3  # stream of random numbers; 1 and 2 order the images


@dataclass
class Batch:
    """images [B, 3, H, W] float32 RGB in [0, 1]; labels [B, H, W] uint8, 255 = ignore (all of it where the data set has no labels)."""

    images: Tensor
    labels: Tensor
    names: list[str]
    problems: list[Problem] = field(default_factory=list)  # files that were skipped for this batch

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.names, self.problems)


def train_batches(
    dataset: Dataset,
    augment: AugmentConfig,
    *,
    size: tuple[int, int],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    balanced: bool = False,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches from `start_step` on, without end. `size` is (width, height) before the crop.

    With N ranks each gets batch_size other images of the same shuffled epoch. balanced: draw images by class (BalancedOrder; reads all
    labels first). A file that cannot be used raises DataError, or is replaced by the next one, logged and counted where the data set skips.
    """
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"train_batches: expected batch_size >= 1 and 0 <= rank < world_size, got {batch_size}, {rank}, {world_size}"
        )
    check_augment(augment, size)
    order: Order = BalancedOrder(class_presence(dataset), seed) if balanced else ShuffledOrder(len(dataset), seed)
    weights = rarity(dataset) if augment.rare_crop and dataset.has_labels else None
    samples = _TrainSamples(dataset, augment, (size[0], size[1]), seed, weights)
    keys = _Keys(order, batch_size, rank, world_size, start_step)
    loader = (
        map(samples.__getitems__, iter(keys)) if workers == 0 else _worker_loader(samples, keys, workers, pin_memory)
    )
    for batch in loader:
        if isinstance(batch, _Failure):
            raise DataError(batch.text)
        for problem in batch.problems:
            note_problem(dataset, problem)
        yield batch.pin_memory() if pin_memory and workers == 0 else batch


def eval_batches(
    dataset: Dataset, size_wh: tuple[int, int], *, workers: int = 0, labels: bool = True
) -> Iterator[tuple[Tensor, np.ndarray | None, str]]:
    """Every image in order: (float32 [1, 3, h, w] at size_wh, labels uint8 at their own size or None, name). Bad files as in training."""
    samples = _EvalSamples(dataset, (size_wh[0], size_wh[1]), labels and dataset.has_labels)
    one_each = [[index] for index in range(len(dataset))]
    loader = (
        map(samples.__getitems__, one_each)
        if workers == 0
        else _worker_loader(samples, one_each, workers, pin_memory=False)
    )
    for item in loader:
        if isinstance(item, _Failure):
            if not dataset.skip_bad_files:
                raise DataError(item.text)
            note_problem(dataset, Problem(item.name, item.text))
            continue
        image, label, name = item
        yield image, None if label is None else label.numpy(), name


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way out of a worker process, so that its text arrives as it was written."""

    name: str
    text: str


@dataclass(frozen=True)
class _Key:
    step: int
    slot: int
    index: int


class _Keys:
    """What each batch holds, from start_step on, without end: lists of keys for one rank."""

    def __init__(self, order: Order, batch_size: int, rank: int, world_size: int, start_step: int):
        self._order, self._start = order, start_step
        self._first, self._batch_size, self._all = rank * batch_size, batch_size, world_size * batch_size

    def __iter__(self) -> Iterator[list[_Key]]:
        step = self._start
        while True:
            slots = range(self._first, self._first + self._batch_size)
            yield [_Key(step, slot, self._order(step * self._all + slot)) for slot in slots]
            step += 1


class _TrainSamples:
    """Keys -> a Batch. Lives in the worker processes."""

    def __init__(
        self, dataset: Dataset, augment: AugmentConfig, size: tuple[int, int], seed: int, weights: np.ndarray | None
    ):
        self._dataset, self._augment, self._size, self._seed, self._weights = dataset, augment, size, seed, weights

    def __getitems__(self, keys: list[_Key]) -> Batch | _Failure:
        width, height = output_size(self._augment, self._size)
        images = np.empty((len(keys), 3, height, width), np.float32)
        labels = np.empty((len(keys), height, width), np.uint8)
        names, problems = [], []
        for place, key in enumerate(keys):
            try:
                index, image, label, bad = self._load(key.index)
            except DataError as error:
                return _Failure(self._dataset.names[key.index], str(error))
            rng = generator(self._seed, _AUGMENT, key.step, key.slot)
            make_sample(image, label, self._augment, self._size, rng, self._weights, images[place], labels[place])
            names.append(self._dataset.names[index])
            problems.extend(bad)
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), names, problems)

    def _load(self, index: int) -> tuple[int, Image.Image, np.ndarray | None, list[Problem]]:
        """The image, or the next one that can be read where bad files are skipped."""
        bad: list[Problem] = []
        for attempt in range(len(self._dataset)):
            at = (index + attempt) % len(self._dataset)
            try:
                return at, *self._dataset.load(at), bad
            except DataError as error:
                if not self._dataset.skip_bad_files:
                    raise
                bad.append(Problem(self._dataset.names[at], str(error)))
        raise DataError(f"none of the {len(self._dataset)} images can be read; the first problem: {bad[0].what}")


class _EvalSamples:
    def __init__(self, dataset: Dataset, size: tuple[int, int], with_labels: bool):
        self._dataset, self._size, self._with_labels = dataset, size, with_labels

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor | None, str] | _Failure:
        (index,) = indices
        try:
            image, label = self._dataset.load(index) if self._with_labels else (self._dataset.image(index), None)
        except DataError as error:
            return _Failure(self._dataset.names[index], str(error))
        return (
            image_tensor(image, self._size)[None],
            None if label is None else torch.from_numpy(label.copy()),
            self._dataset.names[index],
        )


def image_tensor(image: Image.Image, size_wh: tuple[int, int] | None = None) -> Tensor:
    """PIL RGB -> float32 [3, h, w] in [0, 1], resized (bicubic) to size_wh if given."""
    if size_wh is not None and image.size != tuple(size_wh):
        image = image.resize(size_wh, Image.Resampling.BICUBIC)
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    return torch.from_numpy(np.true_divide(pixels, np.float32(255)))


def _worker_loader(samples: object, keys: object, workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_WorkerStart(CACHE.budget_bytes // workers),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own: opening a loader must not move the global random state
    )


def _as_is(batch: object) -> object:
    return batch


@dataclass(frozen=True)
class _WorkerStart:
    cache_bytes: int  # every worker decodes for itself: together they keep to the budget

    def __call__(self, worker: int) -> None:
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # Ctrl-C reaches the whole group; the main process saves its state and ends us
        signal.signal(signal.SIGTERM, _ends_next_time)  # `timeout` and batch systems send it to the group, too
        CACHE.set_budget(self.cache_bytes)


def _ends_next_time(number: int, frame: object) -> None:
    """The main process needs its batches until it has saved; when it ends, a worker gets the signal once more."""
    signal.signal(number, signal.SIG_DFL)
