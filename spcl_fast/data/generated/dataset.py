"""Street scenes made on the fly from (seed, index), with exact labels: the pair of the demo, and a driver's view with Cityscapes' classes.

Nothing is read or written; a scene is a pure function of its domain, split and index. Making one of the pair takes about 5 ms, one of the
driver's larger pictures about 40 ms; the cache keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ... import catalog
from ...errors import ConfigError
from ..cache import CACHE
from ..classes import CITYSCAPES_19, ClassSet, LabelTable
from ..dataset import Dataset
from ..sampling import generator
from . import driver
from .pair import scenes, street, styles
from .pair.scenes import LayoutStatistics

_COUNTS = {"train": 400, "val": 60}

_SOURCE_LAYOUT = LayoutStatistics(
    camera_height=(1.5, 2.4),
    horizon=(0.40, 0.52),
    focal=(0.55, 0.75),
    road_half_width=(3.6, 6.0),
    sidewalk_width=(1.8, 3.6),
    setback=(0.4, 4.0),
    house_height=(5.0, 12.0),
    lots=(0.42, 0.26, 0.14, 0.18),
    cars=(1, 5),
    people=(2, 6),
    trees=(1, 5),
    pole_gap=(9.0, 18.0),
)
_TARGET_LAYOUT = LayoutStatistics(
    camera_height=(1.3, 1.9),
    horizon=(0.36, 0.48),
    focal=(0.6, 0.85),
    road_half_width=(3.2, 5.2),
    sidewalk_width=(1.5, 3.2),
    setback=(0.2, 2.5),
    house_height=(6.0, 16.0),
    lots=(0.50, 0.25, 0.13, 0.12),
    cars=(2, 6),
    people=(2, 7),
    trees=(1, 5),
    pole_gap=(8.0, 16.0),
)


@dataclass(frozen=True)
class Domain:
    """How the scenes of a kind of data set are made. `number` keeps its random numbers apart from those of the others."""

    number: int
    classes: ClassSet
    size: tuple[int, int]
    # size, random numbers -> a scene, which has a method labels()
    make: Callable[[tuple[int, int], np.random.Generator], Any]
    paint: Callable[..., Image.Image]  # scene, rng=random numbers


def _of_pair(number: int, layout: LayoutStatistics, style: styles.Style) -> Domain:
    return Domain(
        number, scenes.CLASSES, (256, 128), partial(street.make_scene, layout), partial(styles.paint, style=style)
    )


SOURCE = _of_pair(1, _SOURCE_LAYOUT, styles.SOURCE)
TARGET = _of_pair(2, _TARGET_LAYOUT, styles.TARGET)
DRIVER = Domain(3, CITYSCAPES_19, (480, 360), driver.make_scene, driver.paint)


def domain_of(kind: str) -> Domain:
    """How the catalog's generated data set of that name is made."""
    return catalog.load(catalog.find(catalog.DATA_SETS, kind).home)


class GeneratedDataset(Dataset):
    """`count` scenes of a domain (default: 400 of train, 60 of val). Training scene i is the same however many there are.

    size: (width, height) in pixels, by default the domain's own. classes, table: other classes, and what the domain's ids become in them.
    """

    _one_per_image = ("names", "_indices")

    def __init__(
        self,
        kind: str,
        split: str,
        *,
        count: int | None = None,
        has_labels: bool = True,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        classes: ClassSet | None = None,
        table: LabelTable | None = None,
    ):
        if split not in _COUNTS:
            raise ConfigError(f"{kind} has no split {split!r}; expected one of {', '.join(_COUNTS)}.")
        self.domain = domain_of(kind)
        count = _COUNTS[split] if count is None else count
        names = [f"{split}_{index:05d}" for index in range(count)]
        super().__init__(kind, split, classes or self.domain.classes, names, has_labels=has_labels)
        self._indices = list(range(count))
        width, height = size or self.domain.size
        self.size, self.seed, self._table = (width, height), seed, table

    def image(self, index: int) -> Image.Image:
        return CACHE.get((*self._key(index), "image"), lambda: self._paint(index))

    def label(self, index: int) -> np.ndarray | None:
        if not self.has_labels:
            return None
        return CACHE.get(self._label_key(index), lambda: self._labels(self.scene(index)))

    def scene(self, index: int) -> Any:
        """The scene before it is painted."""
        return self.domain.make(self.size, self._rng(index, stream=0))

    def _paint(self, index: int) -> Image.Image:
        scene = self.scene(index)
        if self.has_labels:
            CACHE.put(self._label_key(index), self._labels(scene))
        return self.domain.paint(scene, rng=self._rng(index, stream=1))

    def _labels(self, scene: Any) -> np.ndarray:
        labels = scene.labels()
        if self._table is not None:
            labels = self._table.apply(labels)
        labels.flags.writeable = False
        return labels

    def _key(self, index: int) -> tuple:
        return (self.kind, self.split, self.size, self.seed, self._indices[index])

    def _label_key(self, index: int) -> tuple:
        return (*self._key(index), "label", None if self._table is None else self._table.key())

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return generator(self.seed, self.domain.number, int(self.split == "val"), self._indices[index], stream)
