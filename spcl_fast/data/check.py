"""Look at every file of a data set before hours of training do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ..errors import DataError
from .classes import IGNORE
from .dataset import Dataset, Problem


@dataclass
class DataReport:
    """What `check_data` found. `ok` is False where a file is broken, missing, or holds ids nobody has heard of."""

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

    @property
    def ok(self) -> bool:
        return not self.problems and not self.unknown

    @property
    def shares(self) -> np.ndarray:
        """Share of each class in the labelled pixels, float64 [K]."""
        return self.pixels / max(int(self.pixels.sum()), 1)

    def text(self, most: int = 20) -> str:
        """A table for people; at most `most` problems are spelt out."""
        lines = [f"{self.kind}, split {self.split!r}: {self.images} images, {self.checked} checked"]
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
                + ", ".join(f"{k} ({n} pixels)" for k, n in sorted(self.unknown.items()))
            )
        lines += ["", f"{len(self.problems)} problems" if self.problems else "no problems"]
        lines += [f"- {problem.name}: {problem.what}" for problem in self.problems[:most]]
        if len(self.problems) > most:
            lines.append(f"... and {len(self.problems) - most} more")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def check_data(dataset: Dataset, num_samples: int | None = None) -> DataReport:
    """Decode every image and label (or num_samples spread evenly) and tell problems, sizes, unknown ids and class shares.

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
    )
    pixels = np.zeros(256, np.int64)
    images_with = np.zeros(256, np.int64)
    for index, name in enumerate(read.names):
        try:
            image, label = read.load(index)
            unknown = read.unknown_ids(index)
        except DataError as error:
            report.problems.append(Problem(name, str(error)))
            continue
        report.sizes[image.size] += 1
        report.unknown.update(unknown)
        if label is not None:
            counts = np.bincount(label.ravel(), minlength=256)
            pixels += counts
            images_with += counts > 0
    classes = len(dataset.classes)
    report.pixels, report.images_with, report.ignored = pixels[:classes], images_with[:classes], int(pixels[IGNORE])
    return report
