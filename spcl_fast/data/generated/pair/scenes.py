"""Street scenes as maps of parts: where everything is, exactly, and nothing yet about how it looks.

Every pixel belongs to one *part* (the front of this house, the glass of that car); a part has a class and a kind. street.py draws a scene,
and a style (styles.py) gives kinds their colours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...classes import ClassSet

CLASSES = ClassSet(
    names=("road", "sidewalk", "building", "fence", "pole", "vegetation", "sky", "car", "person"),
    palette=(
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (190, 153, 153), (153, 153, 153), (107, 142, 35), (70, 130, 180), (0, 0, 142),
        (220, 20, 60),
    ),
)  # fmt: skip
ROAD, SIDEWALK, BUILDING, FENCE, POLE, VEGETATION, SKY, CAR, PERSON = range(9)

_KINDS_OF_CLASS = {
    SKY: ("sky",),
    ROAD: ("road", "marking", "shadow"),
    SIDEWALK: ("sidewalk",),
    VEGETATION: ("verge", "hedge", "crown", "crown_light", "trunk", "far_trees"),
    BUILDING: ("far_houses", "house", "house_end", "window"),
    FENCE: ("fence", "slat"),
    POLE: ("pole",),
    CAR: ("car", "car_side", "glass", "tyre", "lamp"),
    PERSON: ("coat", "legs", "skin"),
}
_CLASS_OF_KIND = {kind: label for label, kinds in _KINDS_OF_CLASS.items() for kind in kinds}
KINDS = tuple(_CLASS_OF_KIND)

Range = tuple[float, float]


@dataclass(frozen=True)
class LayoutStatistics:
    """How a domain's streets are built; lengths in metres, ranges drawn uniformly."""

    camera_height: Range
    horizon: Range  # share of the picture's height above it
    focal: Range  # in picture widths
    road_half_width: Range
    sidewalk_width: Range
    setback: Range  # from the sidewalk to the lots
    house_height: Range
    lots: tuple[float, float, float, float]  # shares of houses, fences, hedges, open ground
    cars: tuple[int, int]
    people: tuple[int, int]
    trees: tuple[int, int]
    pole_gap: Range


@dataclass
class Scene:
    """A picture as parts. `across`, `along` are surface coordinates in metres for textures; `depth` is the distance in metres."""

    part: np.ndarray  # uint8 [H, W]
    depth: np.ndarray  # float32 [H, W]
    across: np.ndarray  # float32 [H, W]
    along: np.ndarray  # float32 [H, W]
    kinds: list[int] = field(default_factory=list)  # kind of each part, an index into KINDS
    groups: list[int] = field(default_factory=list)  # parts of one group (a car's body and side) take one colour draw
    sides: list[int] = field(default_factory=list)  # -1 left of the street, 1 right, 0 towards the camera or flat

    def labels(self) -> np.ndarray:
        """uint8 [H, W], every pixel labelled."""
        table = np.zeros(256, np.uint8)
        table[: len(self.kinds)] = [_CLASS_OF_KIND[KINDS[kind]] for kind in self.kinds]
        return table[self.part]
