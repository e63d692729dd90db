"""Pseudo-labels: the images of a data set with labels from a folder of train-id PNGs, ours or those of the released code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError
from .cache import CACHE
from .classes import IGNORE
from .dataset import Dataset, Problem, frozen, path_key
from .files import inside
from .palette import read_label_png


def with_pseudo_labels(dataset: Dataset, folder: str | Path) -> Dataset:
    """The images of `dataset` with the labels of folder/<name>.png, as train ids; files flat under the last part of the name also count,
    as the released code writes them. Raises DataError for an image without a file (left out with skip_bad_files)."""
    folder = Path(folder)
    found, keep, problems = [], [], []
    for index, name in enumerate(dataset.names):
        last = name.rsplit("/", 1)[-1]
        candidates = (folder / f"{name}.png", folder / f"{last}.png", folder / f"{last}_leftImg8bit.png")
        path = next((c for c in candidates if c.is_file()), None)
        if path is None:
            problems.append(Problem(name, f"no pseudo-label: expected {candidates[0]}"))
            continue
        found.append(path if dataset.follow_links else inside(folder, path))
        keep.append(index)
    if problems and not dataset.skip_bad_files or not found:
        raise DataError(
            f"{len(problems)} of {len(dataset)} images have no pseudo-label; the first is {problems[0].name!r}: "
            f"expected {folder / problems[0].name}.png. "
            "Make them with `spcl-fast pseudo-label`."
        )
    result = PseudoLabelled(dataset.select(keep) if problems else dataset, folder, found)
    result.problems = problems
    return result


class PseudoLabelled(Dataset):
    """The images of another data set with labels from a folder of train-id PNGs, of any size."""

    _one_per_image = ("names", "_label_files")

    def select(self, indices: Sequence[int]) -> Dataset:
        subset: Any = super().select(indices)
        subset._base = self._base.select(indices)
        return subset

    def __init__(self, base: Dataset, folder: Path, label_files: list[Path]):
        super().__init__(
            base.kind, base.split, base.classes, base.names, has_labels=True, skip_bad_files=base.skip_bad_files
        )
        self._base, self.folder, self._label_files = base, folder, label_files

    def image_path(self, index: int) -> Path | None:
        return self._base.image_path(index)

    def label_path(self, index: int) -> Path:
        return self._label_files[index]

    def image(self, index: int) -> Image.Image:
        return self._base.image(index)

    def label(self, index: int) -> np.ndarray:
        path = self._label_files[index]
        return CACHE.get(("pseudo", path_key(path), len(self.classes)), lambda: self._read(path))

    def _read(self, path: Path) -> np.ndarray:
        label = read_label_png(path)
        counts = np.bincount(label.ravel(), minlength=256)
        counts[: len(self.classes)] = counts[IGNORE] = 0
        if counts.any():
            value = int(np.flatnonzero(counts)[0])
            raise DataError(
                f"pseudo-label {path} holds {value}; expected a class of 0-{len(self.classes) - 1} or 255. "
                "Was it made for other classes? Make it again with `spcl-fast pseudo-label`."
            )
        return frozen(label)
