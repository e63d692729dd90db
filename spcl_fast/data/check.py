"""Look at every file of a data set before hours of training do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .. import catalog
from ..config import DataConfig, LoopConfig
from ..errors import DataError
from .build import UnlabelledError, dataset_of
from .census import Census
from .dataset import Dataset, Problem
from .left_out import counted


@dataclass
class DataReport:
    """What `check_data` found. `ok` is False where a file is broken, missing, or holds unknown ids."""

    kind: str
    split: str
    images: int
    checked: int
    has_labels: bool
    classes: tuple[str, ...]
    sizes: Counter = field(default_factory=Counter)  # (width, height) -> images
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # labelled pixels by class [K]
    images_with: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # images that hold the class [K]
    ignored: int = 0  # pixels
    unknown: Counter = field(default_factory=Counter)  # id -> pixels
    problems: list[Problem] = field(default_factory=list)
    dataset: Dataset | None = field(default=None, repr=False)  # what was looked at

    @property
    def ok(self) -> bool:
        return not self.problems and not self.unknown

    @property
    def shares(self) -> np.ndarray:
        """Share of each class in the labelled pixels, float64 [K]."""
        return self.pixels / max(int(self.pixels.sum()), 1)

    def text(self, most: int = 20) -> str:
        """A table for people; at most `most` problems are spelt out."""
        lines = [f"{self.kind}, split {self.split!r}: {counted(self.images, 'image')}, {self.checked} checked"]
        lines.append(
            "sizes: "
            + ", ".join(f"{w}x{h} ({n})" for (w, h), n in self.sizes.most_common(6))
            + (", ..." if len(self.sizes) > 6 else "")
        )
        if self.has_labels:
            lines += ["", f"{'class':<16}{'pixels':>9}{'images':>9}"]
            for name, share, images in zip(self.classes, self.shares, self.images_with, strict=True):
                note = "   never occurs" if images == 0 else ""
                lines.append(f"{name:<16}{share:>8.2%} {images:>8}{note}")
            total = self.ignored + int(self.pixels.sum())
            lines.append(f"{'(ignored)':<16}{self.ignored / max(total, 1):>8.2%} of all pixels")
        else:
            lines.append("labels: none used")
        if self.unknown:
            lines.append(
                "ids that this data set is not known to hold, counted as ignored: "
                + ", ".join(f"{k} ({counted(n, 'pixel')})" for k, n in sorted(self.unknown.items()))
            )
        lines += ["", counted(len(self.problems), "problem") if self.problems else "no problems"]
        lines += [f"- {problem.name}: {problem.what}" for problem in self.problems[:most]]
        if len(self.problems) > most:
            lines.append(f"... and {len(self.problems) - most} more")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def check_data(dataset: Dataset, num_samples: int | None = None, *, training: bool | None = None) -> DataReport:
    """Decode every image and label (or num_samples spread evenly) and tell problems, sizes, unknown ids and class shares.

    training: whether nets are to learn from these labels, so that a class that never occurs is a problem; None: if the split is "train".
    Never raises for a bad file. Open the data set with skip_bad_files=True so that missing pairs end up in the report too.
    """
    read = dataset.spread(num_samples)
    report = DataReport(
        dataset.kind,
        dataset.split,
        len(dataset),
        len(read),
        dataset.has_labels,
        dataset.classes.names,
        problems=[*dataset.problems, *dataset.left_out],
        dataset=dataset,
    )
    census = Census(dataset.classes.names, dataset.table, len(dataset))
    for index, name in enumerate(read.names):
        try:
            image, label = read.load(index)
            if label is not None:
                census.add(read.label_ids(index))
        except DataError as error:
            report.problems.append(Problem(name, str(error)))
            continue
        report.sizes[image.size] += 1
    classes = len(dataset.classes)
    report.pixels, report.images_with = census.pixels[:classes], census.images_with[:classes]
    report.ignored, report.unknown = census.ignored, census.unknown
    training = dataset.split == "train" if training is None else training
    for finding in census.findings():
        # what few labels lack others may have; what is drawn here is as it is meant to be; and a part of a known data set need not hold
        # all of its classes, while a list of classes that somebody wrote is meant to be met
        partly = finding.kind == "absent" and (
            len(read) < len(dataset)
            or not _is_files(dataset)
            or (_has_classes_of_its_own(dataset) and not finding.stops)
        )
        if not partly and (training or finding.kind in ("nothing", "unknown")):
            report.problems.append(Problem("labels", finding.text))
    return report


def check_domain(
    domain: DataConfig, reading: LoopConfig, num_samples: int | None, *, training: bool, needs: bool
) -> Iterator[DataReport]:
    """Reports of both splits of a domain. training: the labels of its training images are looked at, too.

    needs: nothing works without labels; else validation images without any are no problem, as nothing but the scores needs them.
    """
    yield check_data(
        dataset_of(domain, domain.train_split, labels=training, reading=reading), num_samples, training=training
    )
    try:
        dataset = dataset_of(domain, domain.val_split, reading=reading)
    except UnlabelledError:
        if needs:
            raise
        dataset = dataset_of(domain, domain.val_split, labels=False, reading=reading)
    yield check_data(dataset, num_samples, training=False)


def check_same_classes(source: Sequence[str], target: Sequence[str]) -> None:
    """Raise DataError where the domains have different classes: their ids would mean different things."""
    if tuple(source) != tuple(target):
        raise DataError(
            f"source and target have different classes: {', '.join(source)} and {', '.join(target)}. "
            "Give both domains the same ones: source.classes and target.classes may name one JSON file with a table for each."
        )


def _is_files(dataset: Dataset) -> bool:
    return len(dataset) > 0 and all(dataset.image_path(index) is not None for index in (0, len(dataset) - 1))


def _has_classes_of_its_own(dataset: Dataset) -> bool:
    """Whether its reader brings the classes, as Cityscapes' does, and no file of the user's."""
    return any(row.name == dataset.kind and row.num_classes for row in catalog.DATA_SETS)
