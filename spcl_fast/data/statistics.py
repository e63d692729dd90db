"""How often each class occurs: by image, for balanced sampling, and overall, for class weights and rare crops."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import DataError
from .census import Census
from .classes import IGNORE
from .dataset import Dataset, LabelIds, Problem
from .label_info import presence_from_info

log = logging.getLogger("spcl_fast.data")
_COUNTED: WeakKeyDictionary[Dataset, dict[int | None, list[LabelIds]]] = WeakKeyDictionary()


def class_counts(dataset: Dataset, max_images: int | None = None) -> np.ndarray:
    """Labelled pixels by image and class, int64 [n, K]; n = len(dataset), or at most max_images spread evenly over it.

    Reads every label once and remembers the answer for the life of the data set. A broken label raises DataError, or counts
    as empty where the data set skips bad files.
    """
    if not dataset.has_labels:
        raise DataError(
            f"{dataset.kind}, split {dataset.split!r} was opened without labels, so its classes cannot be counted."
        )
    classes = len(dataset.classes)
    return np.stack([label.train[:classes] for label in _label_ids(dataset, max_images)])


def census(dataset: Dataset, max_images: int | None = None) -> Census:
    """What the labels hold, of all images or of at most max_images spread evenly; read once for this and for `class_counts`."""
    found = Census(dataset.classes.names, dataset.table, len(dataset))
    for label in _label_ids(dataset, max_images):
        if label.own:  # a label that cannot be read is none
            found.add(label)
    return found


def _label_ids(dataset: Dataset, max_images: int | None) -> list[LabelIds]:
    known = _COUNTED.setdefault(dataset, {})
    if max_images is not None and max_images >= len(dataset):
        max_images = None
    if max_images not in known:
        picks = (
            range(len(dataset)) if max_images is None else (np.arange(max_images) * len(dataset) // max_images).tolist()
        )
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            known[max_images] = list(pool.map(lambda i: _count(dataset, i), picks))
    return known[max_images]


def class_presence(dataset: Dataset) -> np.ndarray:
    """Which image holds which class, bool [n, K]: from the `*_label_info.p` next to the data if it fits, else by reading every label."""
    info = getattr(dataset, "label_info", None)
    if info is not None:
        presence = presence_from_info(info, dataset.names, len(dataset.classes))
        if presence is not None:
            return presence
        log.warning("%s does not fit %s, split %r: the labels are counted instead", info, dataset.kind, dataset.split)
    return class_counts(dataset) > 0


def class_frequency(dataset: Dataset, max_images: int | None = None) -> np.ndarray:
    """Share of each class in the labelled pixels, float64 [K], summing to 1 (all 0 where nothing is labelled)."""
    counts = class_counts(dataset, max_images).sum(0)
    return counts / max(int(counts.sum()), 1)


def rarity(dataset: Dataset, max_images: int = 256, power: float = 0.5) -> np.ndarray:
    """Weight of each class that favours rare ones: frequency ** -power, float64 [K]; a class not met counts like the rarest met."""
    frequency = class_frequency(dataset, max_images)
    return np.maximum(frequency, frequency[frequency > 0].min(initial=1.0)) ** -power


def _count(dataset: Dataset, index: int) -> LabelIds:
    try:
        return dataset.label_ids(index)
    except DataError as error:
        if not dataset.skip_bad_files:
            raise
        note_problem(dataset, Problem(dataset.names[index], str(error)))
        return LabelIds(np.zeros(IGNORE + 1, np.int64), {}, {})


def note_problem(dataset: Dataset, problem: Problem) -> None:
    """Log a skipped file once and keep it for the report."""
    if all(problem.name != old.name for old in dataset.problems):
        dataset.problems.append(problem)
        log.warning("skipped %s (%d so far): %s", problem.name, len(dataset.problems), problem.what)
