"""What every data set is: named images, each with train-id labels or none."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..errors import DataError
from .cache import CACHE, file_key
from .classes import IGNORE, ClassSet, LabelTable
from .files import MAX_PIXELS, read_image


class ReadIds(Protocol):
    """A label file -> its ids [H, W]."""

    def __call__(self, path: Path, /, *, max_pixels: int = MAX_PIXELS) -> np.ndarray: ...


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with one file of a data set."""

    name: str
    what: str


class LabelIds(NamedTuple):
    """Pixels of one label: by train id, int64 [256]; by the set's own id; and of those that the set is not known to hold."""

    train: np.ndarray
    own: dict[int, int]
    unknown: dict[int, int]


class Dataset:
    """Images by index. `names` are relative, unique and safe to use as file names below any folder.

    `problems` holds what was left out when the set was built with skip_bad_files, `left_out` what its folders hold besides.
    """

    table: LabelTable | None = None  # own ids -> train ids; None: the ids are train ids
    left_out: Sequence[Problem] = ()
    follow_links = False
    max_pixels = MAX_PIXELS

    def __init__(
        self,
        kind: str,
        split: str,
        classes: ClassSet,
        names: list[str],
        *,
        has_labels: bool,
        skip_bad_files: bool = False,
    ):
        self.kind, self.split, self.classes, self.names = kind, split, classes, names
        self.has_labels = has_labels
        self.skip_bad_files = skip_bad_files
        self.problems: list[Problem] = []

    def __len__(self) -> int:
        return len(self.names)

    def image_path(self, index: int) -> Path | None:
        """The file of an image; None where there is none (generated scenes)."""
        return None

    def label_path(self, index: int) -> Path | None:
        """The label file of an image; None where there is none."""
        return None

    def image(self, index: int) -> Image.Image:
        """PIL RGB, shared with the cache: do not write into it."""
        raise NotImplementedError

    def label(self, index: int) -> np.ndarray | None:
        """Train ids uint8 [H, W], 255 = ignore, shared with the cache; None without labels."""
        raise NotImplementedError

    def load(self, index: int) -> tuple[Image.Image, np.ndarray | None]:
        """The image and its labels. Raises DataError that names the file where either is broken or their sizes differ."""
        return self.image(index), self.label(index)

    def label_ids(self, index: int) -> LabelIds:
        """How many pixels of a label have which id. Raises DataError as `label` does, ValueError without labels."""
        label = self.label(index)
        if label is None:
            raise ValueError(f"{self.kind}, split {self.split!r}, has no labels to count")
        counts = np.bincount(label.ravel(), minlength=IGNORE + 1)
        return LabelIds(counts, {int(k): int(counts[k]) for k in np.flatnonzero(counts)}, {})

    def unknown_ids(self, index: int) -> dict[int, int]:
        """Pixels by raw id, for ids this data set is not known to hold. They count as ignored."""
        return self.label_ids(index).unknown if self.has_labels else {}

    def select(self, indices: Sequence[int]) -> Dataset:
        """The images of these indices, in this order, as a data set of its own."""
        subset = copy.copy(self)
        subset.problems = []
        for attribute in self._one_per_image:
            if (values := getattr(self, attribute)) is not None:
                setattr(subset, attribute, [values[i] for i in indices])
        return subset

    def spread(self, count: int | None) -> Dataset:
        """At most `count` of the images, spread evenly over them; all of them for None."""
        length = len(self)
        return self if count is None or count >= length else self.select([i * length // count for i in range(count)])

    _one_per_image: tuple[str, ...] = ("names",)


class FileDataset(Dataset):
    """Images and, if `label_files` is given, label files of the same size, read by `read_ids` and mapped by `table`."""

    table: LabelTable

    _one_per_image = ("names", "_image_files", "_label_files")

    def __init__(
        self,
        kind: str,
        split: str,
        classes: ClassSet,
        files: dict[str, Path],
        *,
        label_files: list[Path] | None,
        table: LabelTable,
        read_ids: ReadIds,
        skip_bad_files: bool = False,
    ):
        super().__init__(
            kind, split, classes, list(files), has_labels=label_files is not None, skip_bad_files=skip_bad_files
        )
        self._image_files = list(files.values())
        self._label_files = label_files
        self.table, self._read_ids = table, read_ids
        self.label_info: Path | None = (
            None  # the released scripts' file of which image holds which class, if the set came with one
        )

    def image_path(self, index: int) -> Path:
        return self._image_files[index]

    def label_path(self, index: int) -> Path | None:
        return None if self._label_files is None else self._label_files[index]

    def image(self, index: int) -> Image.Image:
        return cached_image(self._image_files[index], self.max_pixels)

    def label(self, index: int) -> np.ndarray | None:
        if self._label_files is None:
            return None
        path = self._label_files[index]
        return CACHE.get(self._label_key(path), lambda: frozen(self.table.apply(self._read_ids(path))))

    def _label_key(self, path: Path) -> tuple[object, ...]:
        reader: Any = self._read_ids
        how = (reader.func, *sorted(reader.keywords.items())) if isinstance(reader, functools.partial) else reader
        return ("label", path_key(path), self.table.key(), how)

    def label_ids(self, index: int) -> LabelIds:
        if self._label_files is None:
            raise ValueError(f"{self.kind}, split {self.split!r}, has no labels to count")
        path = self._label_files[index]
        ids = self._read_ids(path)
        label = frozen(self.table.apply(ids))
        CACHE.put(self._label_key(path), label)
        counts = np.bincount(ids.ravel())
        own = {int(k): int(counts[k]) for k in np.flatnonzero(counts)}
        unknown = {k: count for k, count in own.items() if not self.table.known[k]}
        return LabelIds(np.bincount(label.ravel(), minlength=IGNORE + 1), own, unknown)

    def load(self, index: int) -> tuple[Image.Image, np.ndarray | None]:
        image, label = self.image(index), self.label(index)
        if label is not None and label.shape != (image.height, image.width):
            raise DataError(
                f"label {self.label_path(index)} is {label.shape[1]}x{label.shape[0]}, but its image {self.image_path(index)} is "
                f"{image.width}x{image.height}. Pairs must have one size: correct the pair, or pass --skip-bad-files."
            )
        return image, label


class Merged(Dataset):
    """The images of two data sets with the same classes, one set after the other; the second one's names lie in a folder called after it.

    Raises DataError where the classes differ.
    """

    _one_per_image = ("names", "_places")

    def __init__(self, first: Dataset, second: Dataset):
        if first.classes.names != second.classes.names:
            raise DataError(
                f"{first.kind} and {second.kind} have different classes: {', '.join(first.classes.names)} and "
                f"{', '.join(second.classes.names)}. Give a `classes` file with a table for each."
            )
        names = [*first.names, *(f"{second.kind}/{name}" for name in second.names)]
        kind = f"{first.kind}+{second.kind}"
        super().__init__(
            kind, first.split, first.classes, names, has_labels=first.has_labels, skip_bad_files=first.skip_bad_files
        )
        self.problems = [*first.problems, *second.problems]
        self.table = None if second.table is None else first.table  # what either can hold, the two can
        self.left_out = [*first.left_out, *second.left_out]
        self._places = [(part, index) for part in (first, second) for index in range(len(part))]

    def image_path(self, index: int) -> Path | None:
        part, own = self._places[index]
        return part.image_path(own)

    def label_path(self, index: int) -> Path | None:
        part, own = self._places[index]
        return part.label_path(own)

    def image(self, index: int) -> Image.Image:
        part, own = self._places[index]
        return part.image(own)

    def label(self, index: int) -> np.ndarray | None:
        part, own = self._places[index]
        return part.label(own)

    def load(self, index: int) -> tuple[Image.Image, np.ndarray | None]:
        part, own = self._places[index]
        return part.load(own)

    def label_ids(self, index: int) -> LabelIds:
        part, own = self._places[index]
        return part.label_ids(own)


def cached_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    return CACHE.get(("image", path_key(path)), lambda: read_image(path, max_pixels))


def path_key(path: Path) -> object:
    try:
        return file_key(path)
    except OSError:
        return str(path)  # reading it will say what is wrong


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
