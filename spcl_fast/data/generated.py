"""The embedded pair of domains: street scenes made on the fly from (seed, index), with exact labels, in two styles.

Nothing is read or written; a scene is a pure function of its domain, split and index. Making one takes about 5 ms and the cache keeps it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import ConfigError
from .cache import CACHE
from .dataset import Dataset
from .sampling import generator
from .scenes import CLASSES, LayoutStatistics, Scene, make_scene
from .styles import SOURCE, TARGET, Style, paint

SIZE = (256, 128)
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
_DOMAINS: dict[str, tuple[int, LayoutStatistics, Style]] = {
    "generated_source": (1, _SOURCE_LAYOUT, SOURCE),
    "generated_target": (2, _TARGET_LAYOUT, TARGET),
}


class GeneratedDataset(Dataset):
    """`count` scenes of a domain (default: 400 of train, 60 of val). Training scene i is the same however many there are."""

    _one_per_image = ("names", "_indices")

    def __init__(
        self, kind: str, split: str, *, count: int | None = None, has_labels: bool = True, size: tuple[int, int] = SIZE, seed: int = 0
    ):
        if split not in _COUNTS:
            raise ConfigError(f"{kind} has no split {split!r}; expected one of {', '.join(_COUNTS)}.")
        count = _COUNTS[split] if count is None else count
        super().__init__(kind, split, CLASSES, [f"{split}_{index:05d}" for index in range(count)], has_labels=has_labels)
        self._indices = list(range(count))
        self.size, self.seed = tuple(size), seed

    def image(self, index: int) -> Image.Image:
        return CACHE.get((*self._key(index), "image"), lambda: self._paint(index))

    def label(self, index: int) -> np.ndarray | None:
        if not self.has_labels:
            return None
        return CACHE.get((*self._key(index), "label"), lambda: self._labels(self.scene(index)))

    def scene(self, index: int) -> Scene:
        """The scene before it is painted."""
        _, layout, _ = _DOMAINS[self.kind]
        return make_scene(layout, self.size, self._rng(index, stream=0))

    def _paint(self, index: int) -> Image.Image:
        scene = self.scene(index)
        if self.has_labels:
            CACHE.put((*self._key(index), "label"), self._labels(scene))
        return paint(scene, _DOMAINS[self.kind][2], self._rng(index, stream=1))

    @staticmethod
    def _labels(scene: Scene) -> np.ndarray:
        labels = scene.labels()
        labels.flags.writeable = False
        return labels

    def _key(self, index: int) -> tuple:
        return (self.kind, self.split, self.size, self.seed, self._indices[index])

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        return generator(self.seed, _DOMAINS[self.kind][0], int(self.split == "val"), self._indices[index], stream)
