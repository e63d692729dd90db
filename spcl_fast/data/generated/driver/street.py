"""A street seen through a windscreen while it is being drawn: the camera, the street's cross-section, and the pictures of parts.

Coordinates in metres: `s` across the street (0 at the camera, right positive), `y` above the ground, `z` ahead. The street may bend: what
is at (s, z) lies s + bend * z * z to the right of the camera's axis.

Arrays and scalars use + - * /, square roots and comparisons alone, which IEEE 754 fixes, so a seed gives the same scene on every machine
with this version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .kinds import LABELS

FLAT, AHEAD, LEFT, RIGHT = range(
    4
)  # a surface lies on the ground, faces the camera, or faces the street from its left or right side
FAR = 110.0  # metres: rows of houses end here, then comes the skyline
_NEAR = 0.8  # metres: what is nearer is drawn as if at this distance, which is outside of the picture

Point = tuple[float, float, float]  # s, y, z
Thing = tuple[float, Callable[[], None]]  # distance, and what draws it


@dataclass(frozen=True)
class Part:
    """One surface of one thing. Parts of a `group` take one draw of colour; `depth` is given for what stands alone in the street."""

    kind: str
    group: int
    facing: int
    depth: float | None


@dataclass
class Scene:
    """A picture as parts: `part` has what each pixel is, `seen` what shows there, which differs where one sees through (SEEN_THROUGH)."""

    part: np.ndarray  # int32 [H, W], an index into `parts`
    seen: np.ndarray  # int32 [H, W]
    depth: np.ndarray  # float32 [H, W], metres, of what is seen
    shade: np.ndarray  # uint8 [H, W], how much of the sun is kept from the ground
    under: np.ndarray  # uint8 [H, W], how much of the whole sky is kept from the ground: beneath cars
    u: np.ndarray  # float32 [W], x / z of each column
    v: np.ndarray  # float32 [H], (eye - y) / z of each row
    sun: float = 1.0  # -1: from the left, 1: from the right
    overcast: bool = False
    parts: list[Part] = field(default_factory=list)

    def labels(self) -> np.ndarray:
        """uint8 [H, W], every pixel labelled."""
        return np.array([LABELS[part.kind] for part in self.parts], np.uint8)[self.part]


class Street:
    """The scene and what is needed to draw in it."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator):
        self.rng = rng
        self.width, self.height = size
        uniform, chance = self.uniform, self.chance
        self.eye, self.focal = uniform(1.3, 1.7), uniform(0.8, 1.3) * self.width
        self.x0, self.y0 = self.width * uniform(0.34, 0.66), self.height * uniform(0.42, 0.55)
        self.bend = uniform(-0.004, 0.004) if chance(0.4) else 0.0
        self.traffic = -1 if chance(0.5) else 1  # the side of the road that the camera's car keeps to
        self.lane = uniform(2.7, 3.6)
        self.parking = {side: chance(0.36) for side in (-1, 1)}
        own, other = self.traffic, -self.traffic
        in_lane = uniform(-0.35, 0.35)
        self.centre = other * (self.lane / 2 + in_lane)  # s of the line between the directions
        lanes = 2 if chance(0.15) else 1
        self.edge = {
            own: self.lane / 2 - in_lane + self.parking[own] * 2.1 + uniform(0.0, 0.6),
            other: abs(self.centre) + lanes * self.lane + self.parking[other] * 2.1 + uniform(0.0, 0.5),
        }  # distance of the kerbs
        self.walk = {
            side: self.edge[side] + (uniform(1.6, 4.0) if chance(0.65) else uniform(4.0, 8.0)) for side in (-1, 1)
        }
        self.sun = (
            -1.0 if chance(0.5) else 1.0,
            uniform(0.4, 2.6),
            uniform(-1.2, 1.2),
        )  # side; shift of a shadow a metre of height, across and along
        u = ((np.arange(self.width) + 0.5 - self.x0) / self.focal).astype(np.float32)
        v = ((np.arange(self.height) + 0.5 - self.y0) / self.focal).astype(np.float32)
        shape = (self.height, self.width)
        arrays: Any = [np.zeros(shape, t) for t in (np.int32, np.int32, np.float32, np.uint8, np.uint8)]
        self.scene = Scene(*arrays, u=u, v=v, sun=self.sun[0], overcast=chance(0.45))
        self.groups = 0
        self.depth_now: float | None = None

    # ---- chance ----

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, choices: Sequence):
        return choices[int(self.rng.integers(len(choices)))]

    def weighted(self, shares: dict[str, float]) -> str:
        """A name drawn in proportion to its share."""
        left = self.rng.random() * sum(shares.values())
        for name, share in shares.items():
            left -= share
            if left < 0:
                return name
        return name

    # ---- parts ----

    def group(self) -> int:
        self.groups += 1
        return self.groups

    def part(self, kind: str, *, group: int | None = None, facing: int = AHEAD) -> int:
        self.scene.parts.append(Part(kind, self.group() if group is None else group, facing, self.depth_now))
        return len(self.scene.parts) - 1

    # ---- upright surfaces along or across the street, as blocks of the arrays ----

    def hit(self, side: int, front: float) -> np.ndarray:
        """Distance at which each column's ray meets the surface `front` metres to that side of the street; infinite where it does not."""
        u, bend = self.scene.u * np.float32(side), np.float32(side * self.bend)
        under_root = u * u - 4 * bend * np.float32(front)
        below = u + np.sqrt(np.maximum(under_root, 0))
        meets = (under_root >= 0) & (below > 1e-6)
        return np.where(meets, 2 * np.float32(front) / np.where(meets, below, 1), np.float32(np.inf))

    def across(self, z: float) -> np.ndarray:
        """s of each column's ray at distance z, float32 [W]."""
        return self.scene.u * np.float32(z) - np.float32(self.bend * z * z)

    def block(self, columns: np.ndarray, z: np.ndarray, tall: np.ndarray, base: float = 0.0) -> Block | None:
        """The pixels of an upright surface: neighbouring columns, its distance and height in each. None where nothing of it shows."""
        if not len(columns):
            return None
        nearest = float(z.min())
        top = int(self.y0 - self.focal * (float(tall.max()) - self.eye) / nearest) - 1
        bottom = int(self.y0 + self.focal * (self.eye - base) / nearest) + 2
        rows = slice(max(top, 0), min(max(bottom, 0), self.height))
        above = np.float32(self.eye) - self.scene.v[rows, None] * z[None, :]
        inside = (above >= np.float32(base)) & (above < tall[None, :])
        return Block(self.scene, (rows, slice(int(columns[0]), int(columns[-1]) + 1)), z, above, inside)

    # ---- things that stand in the street, drawn by Pillow ----

    def draw(self, things: list[Thing]) -> None:
        """Things from far to near, so that near ones hide far ones."""
        scene = self.scene
        layers = [Image.fromarray(layer) for layer in (scene.part, scene.seen, scene.shade, scene.under)]
        pens = [ImageDraw.Draw(layer) for layer in layers]
        self.label_pen, self.seen_pen, self.shade_pen, self.under_pen = pens
        self.both = pens[:2]
        first = len(scene.parts)
        for z, draw in sorted(things, key=lambda thing: -thing[0]):
            self.depth_now = z
            draw()
        self.depth_now = None
        scene.part, scene.seen, scene.shade, scene.under = (np.array(layer) for layer in layers)
        depths = np.array([part.depth for part in scene.parts[first:]] or [0], np.float32)
        of_thing = scene.seen >= first
        scene.depth[of_thing] = depths[scene.seen[of_thing] - first]

    def px(self, s: float, y: float, z: float) -> tuple[float, float]:
        scale = self.focal / max(z, _NEAR)
        return self.x0 + scale * (s + self.bend * z * z), self.y0 + scale * (self.eye - y)

    def shape(self, part: int, *corners: Point, pens: Sequence | None = None) -> None:
        points = [self.px(*corner) for corner in corners]
        for pen in pens or self.both:
            pen.polygon(points, fill=part)

    def box(
        self, part: int, s0: float, s1: float, y0: float, y1: float, z: float, pens: Sequence | None = None
    ) -> None:
        (left, bottom), (right, top) = self.px(s0, y0, z), self.px(s1, y1, z)
        for pen in pens or self.both:
            pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=part)

    def oval(self, part: int, s: float, y: float, rs: float, ry: float, z: float, pens: Sequence | None = None) -> None:
        x, line = self.px(s, y, z)
        rs, ry = self.focal * rs / z, self.focal * ry / z
        if rs < 0.4 or ry < 0.4:
            return
        for pen in pens or self.both:
            pen.ellipse((x - rs, line - ry, x + rs, line + ry), fill=part)

    def ring(
        self, part: int, s: float, y: float, rs: float, ry: float, thick: float, z: float, pens: Sequence | None = None
    ) -> None:
        x, line = self.px(s, y, z)
        rs, ry = self.focal * rs / z, self.focal * ry / z
        for pen in pens or self.both:
            pen.ellipse(
                (x - rs, line - ry, x + rs, line + ry), outline=part, width=max(1, round(self.focal * thick / z))
            )

    def rod(self, part: int, start: Point, end: Point, thick: float, pens: Sequence | None = None) -> None:
        """A straight line, as thick as it is there but never thinner than a pixel."""
        wide = max(1, round(self.focal * thick / max(start[2], _NEAR)))
        for pen in pens or self.both:
            pen.line((*self.px(*start), *self.px(*end)), fill=part, width=wide)

    def shadow(self, *corners: Point, strength: int = 255) -> None:
        """The sun's shadow on the ground; it shows when the sun does."""
        self.shade_pen.polygon([self.px(*corner) for corner in corners], fill=strength)


@dataclass
class Block:
    """Pixels of one upright surface. z: float32 [columns]; above: metres over the ground, float32 [rows, columns]; inside: where it is."""

    scene: Scene
    at: tuple[slice, slice]
    z: np.ndarray
    above: np.ndarray
    inside: np.ndarray

    def fill(self, part: int, where: np.ndarray | None = None) -> None:
        """Cover what is there with a part, in `inside` or a part of it."""
        mask = self.inside if where is None else self.inside & where
        np.copyto(self.scene.part[self.at], part, where=mask)
        self.show(part, mask)

    def show(self, part: int, mask: np.ndarray) -> None:
        np.copyto(self.scene.seen[self.at], part, where=mask)
        np.copyto(self.scene.depth[self.at], self.z[None, :], where=mask)

    def columns(self, chosen: slice) -> Block:
        """These columns of it alone."""
        rows, all_columns = self.at
        at = rows, slice(all_columns.start + chosen.start, all_columns.start + chosen.stop)
        return Block(self.scene, at, self.z[chosen], self.above[:, chosen], self.inside[:, chosen])

    def name(self, part: int) -> None:
        """Label the surface, but leave what shows there."""
        self.scene.part[self.at][self.inside] = part
