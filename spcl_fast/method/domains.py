"""The data of a run: both domains, their classes, and the endless batches of a feed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import distributed
from ..config import AugmentConfig, Config, TrainConfig
from ..config.fold import left_out_words, read_fold
from ..data import Batch, ClassSet, Dataset, class_frequency, dataset_of, train_batches
from ..data.check import check_same_classes
from ..data.labelled import choose, part_of
from ..data.left_out import counted
from ..data.statistics import rarity
from ..errors import DataError
from ..runs.identity import step_seed

_COUNTED_IMAGES = 1000  # at most so many labels are read for the class weights


class Domains:
    """Source and target as the settings have them; every data set is read once."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @functools.cache  # noqa: B019  lives as long as its run
    def dataset(self, side: str, split: str, labels: bool = True) -> Dataset:
        """The data of a domain ("source" | "target"), split "train" | "val"."""
        domain = getattr(self.config, side)
        name = domain.train_split if split == "train" else domain.val_split
        return dataset_of(domain, name, labels=labels, reading=self.config.loop)

    @functools.cached_property
    def classes(self) -> ClassSet:
        """The classes of both domains. Raises DataError where they differ: their ids would mean different things."""
        source, target = self.dataset("source", "train").classes, self.dataset("target", "train", labels=False).classes
        check_same_classes(source.names, target.names)
        return source

    @functools.cached_property
    def named_target(self) -> Dataset | None:
        """The target's training images that target.labelled names, those that target.fold leaves out among them; None where it names none.

        No other label file of the training split is opened. Raises DataError where one of them is an image of the validation split.
        """
        target = self.config.target
        if target.labelled is None:
            return None
        every = self.dataset("target", "train", labels=False)
        seed = step_seed(self.config.seed, "target.labelled", 0)
        evaluated = self._evaluated()
        chosen = choose(target.labelled, every.names, seed, () if evaluated is None else evaluated.names)
        if every.image_path(0) is None:  # generated scenes all have labels
            place = {name: index for index, name in enumerate(every.names)}
            indices = [place[name] for name in chosen.names[: chosen.count]]
            return self.dataset("target", "train").select(indices)
        found = dataset_of(target, target.train_split, only=chosen, reading=self.config.loop)
        self._refuse_evaluated(found)
        return found

    @functools.cached_property
    def held_out(self) -> Dataset | None:
        """The part of the named images that target.fold leaves out of all that learns; None without a fold."""
        named, fold = self.named_target, self.config.target.fold
        if named is None or fold is None:
            return None
        part = part_of(named.names, read_fold(fold), step_seed(self.config.seed, "target.fold", 0))
        return named.select([index for index, name in enumerate(named.names) if name in part])

    @functools.cached_property
    def labelled_target(self) -> Dataset | None:
        """The target's training images whose labels stages learn from; None where target.labelled names none."""
        return None if self.named_target is None else self._without_held_out(self.named_target)

    def learnt_from(self, side: str) -> Dataset:
        """The training images of a domain with all labels that a stage may learn from."""
        dataset = self.dataset(side, "train")
        return self._without_held_out(dataset) if side == "target" else dataset

    def _without_held_out(self, dataset: Dataset) -> Dataset:
        if self.held_out is None:
            return dataset
        held_out = set(self.held_out.names)
        return dataset.select([index for index, name in enumerate(dataset.names) if name not in held_out])

    def evaluated(self, *, labels: bool = True) -> Dataset:
        """The target's images that nets are evaluated on: those that target.fold leaves out, else the validation split. DataError as
        `dataset_of` raises it.
        """
        return self.dataset("target", "val", labels=labels) if self.held_out is None else self.held_out

    @property
    def evaluated_count(self) -> int | None:
        """At most so many of them are, None: all. What is left out is evaluated whole, so that the folds cover every labelled image."""
        return self.config.evaluate.images if self.config.target.fold is None else None

    def evaluated_words(self, count: int) -> str:
        """`count` of them, for a line of text."""
        if self.held_out is None or self.named_target is None:
            return counted(count, "target validation image")
        return left_out_words(count, len(self.named_target), str(self.config.target.fold))

    def evaluated_paths(self) -> set[str]:
        """Files of the target's validation images: none where it has no such split, or is generated."""
        evaluated = self._evaluated()
        if evaluated is None:
            return set()
        return {str(path) for index in range(len(evaluated)) if (path := evaluated.image_path(index)) is not None}

    def _evaluated(self) -> Dataset | None:
        try:
            return self.dataset("target", "val", labels=False)
        except DataError:
            return None

    def _refuse_evaluated(self, labelled: Dataset) -> None:
        paths = self.evaluated_paths()
        for index, name in enumerate(labelled.names):
            if str(labelled.image_path(index)) in paths:
                raise DataError(
                    f"target.labelled has {name!r}, which is an image of the validation split ({self.config.target.val_split!r}), too: "
                    "a net would be evaluated on what it learned. Choose other images, or another val_split."
                )

    def unlabelled_target(self) -> Dataset:
        """The target's training images that get pseudo-labels: all, or the first pseudo_label.images."""
        dataset, images = self.dataset("target", "train", labels=False), self.config.pseudo_label.images
        return dataset if images is None or images >= len(dataset) else dataset.select(range(images))

    @functools.cache  # noqa: B019  lives as long as its run
    def source_shares(self) -> dict[str, float]:
        """Share of each class in the source labels; reads them on its first call."""
        return dict(
            zip(self.classes.names, class_frequency(self.dataset("source", "train"), _COUNTED_IMAGES), strict=True)
        )

    def pictured(self, dataset: Dataset) -> Dataset:
        """Of the target's validation images those whose predictions the report shows."""
        return dataset.spread(self.evaluated_count).spread(self.config.evaluate.overlays)

    def batches(
        self, stage: str, side: str, dataset: Dataset, train: TrainConfig, augment: AugmentConfig, *, pin_memory: bool
    ) -> Callable[[int], Iterator[Batch]]:
        """start -> endless batches from that iteration on, other ones for every stage and side."""
        seed = step_seed(self.config.seed, f"{stage}/{side}", 0)
        return lambda start: train_batches(
            dataset,
            augment,
            size=getattr(self.config, side).size,
            batch_size=train.batch_size,
            seed=seed,
            start_step=start,
            workers=self.config.loop.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            balanced=train.balanced_sampling and dataset.has_labels,
            pin_memory=pin_memory,
        )


def class_weight(dataset: Dataset, power: float) -> Tensor | None:
    """[K] = share ** -power with mean 1 over the classes that occur; an absent class weighs as the rarest.

    None for power 0. Raises DataError where nothing is labelled.
    """
    if not power:
        return None
    met = class_frequency(dataset, _COUNTED_IMAGES) > 0
    if not met.any():
        where = f"{dataset.kind}, split {dataset.split!r}"
        raise DataError(
            f"{where}: no pixel of its labels has a known class; `spcl-fast check-data` tells what is there."
        )
    weight = rarity(dataset, _COUNTED_IMAGES, power)
    return torch.tensor(weight / weight[met].mean(), dtype=torch.float32)
