"""A street drawn as a scene of parts.

A camera looks down a straight street. Ground and the two rows of lots next to it are found column by column from the pinhole model; cars,
people, poles and trees are drawn over them from far to near. Both domains share this file; only their statistics differ.

Arrays use + - * / and comparisons alone, which IEEE 754 fixes, so a seed gives the same scene on every machine with this version.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .scenes import KINDS, LayoutStatistics, Range, Scene

_FAR = 90.0  # metres: lots end here, then comes the skyline
_MAX_PARTS = 255


def make_scene(statistics: LayoutStatistics, size: tuple[int, int], rng: np.random.Generator) -> Scene:
    """One street. size: (width, height) in pixels."""
    street = _Street(statistics, size, rng)
    street.draw_ground_and_sky()
    for side in (-1, 1):
        street.draw_lots(side)
    street.draw_objects()
    return street.scene


class _Street:
    """The scene while it is being drawn."""

    def __init__(self, statistics: LayoutStatistics, size: tuple[int, int], rng: np.random.Generator):
        self.rng, self.statistics = rng, statistics
        self.width, self.height_px = size
        uniform = self.uniform
        self.eye = uniform(statistics.camera_height)
        self.focal = uniform(statistics.focal) * self.width
        self.x0 = self.width * uniform((0.38, 0.62))
        self.y0 = self.height_px * uniform(statistics.horizon)
        self.lane_shift = uniform((-1.0, 1.0))  # the camera is not always in the middle of the road
        half = uniform(statistics.road_half_width)
        self.edge = {side: half + side * self.lane_shift for side in (-1, 1)}  # distance to the kerb on each side
        self.walk = {side: self.edge[side] + uniform(statistics.sidewalk_width) for side in (-1, 1)}
        self.front = {side: self.walk[side] + uniform(statistics.setback) for side in (-1, 1)}
        self.u = ((np.arange(self.width) + 0.5 - self.x0) / self.focal).astype(np.float32)  # x / z of each column
        self.v = ((np.arange(self.height_px) + 0.5 - self.y0) / self.focal).astype(
            np.float32
        )  # -(y - eye) / z of each row
        shape = (self.height_px, self.width)
        part = np.zeros(shape, np.uint8)
        depth, across, along = (np.zeros(shape, np.float32) for _ in range(3))
        self.scene = Scene(part, depth, across, along)
        self.next_group = 0

    def uniform(self, span: Range) -> float:
        return span[0] + (span[1] - span[0]) * self.rng.random()

    def part(self, kind: str, *, group: int | None = None, side: int = 0) -> int:
        """A new part; a scene that is full uses its last part of that kind again."""
        scene, index = self.scene, KINDS.index(kind)
        if len(scene.kinds) >= _MAX_PARTS:
            return len(scene.kinds) - 1 - scene.kinds[::-1].index(index)
        if group is None:
            group, self.next_group = self.next_group, self.next_group + 1
        scene.kinds.append(index)
        scene.groups.append(group)
        scene.sides.append(side)
        return len(scene.kinds) - 1

    # ---- surfaces ----

    def draw_ground_and_sky(self) -> None:
        scene, rng = self.scene, self.rng
        sky, road, marking = (self.part(kind) for kind in ("sky", "road", "marking"))
        scene.part[:] = sky
        scene.depth[:] = 1000
        scene.across[:] = self.u[None, :] * 60
        scene.along[:] = self.v[:, None] * 60
        self._draw_skyline()
        rows = np.flatnonzero(self.v > 0)
        z = self.eye / self.v[rows][:, None]
        x = self.u[None, :] * z
        ground = np.full(x.shape, road, np.uint8)
        dashed = ((x - self.lane_shift > -0.08) & (x - self.lane_shift < 0.08)) & (z * (1 / 6) % 1 < 0.5)
        for side in (-1, 1):
            beyond = x * side
            edge_line = (beyond > self.edge[side] - 0.35) & (beyond < self.edge[side] - 0.2)
            ground[edge_line if rng.random() < 0.5 else dashed] = marking
            ground[beyond > self.edge[side]] = self.part("sidewalk")
            ground[beyond > self.walk[side]] = self.part("verge" if rng.random() < 0.7 else "sidewalk")
        scene.part[rows] = ground
        scene.depth[rows], scene.across[rows], scene.along[rows] = np.minimum(z, 1000), x, np.minimum(z, 1000)

    def _draw_skyline(self) -> None:
        """Far trees and houses on the horizon, as steps of random height and width."""
        rng = self.rng
        for kind, tallest, shortest_px in (("far_houses", 0.16, 6), ("far_trees", 0.09, 3)):
            part = self.part(kind)
            steps = rng.integers(shortest_px, shortest_px * 4, size=self.width // shortest_px + 1)
            heights = tallest * rng.random(len(steps)) * (rng.random(len(steps)) < 0.75)
            top = self.y0 - np.repeat(heights, steps)[: self.width] * self.height_px
            rows = np.arange(self.height_px)[:, None]
            mask = (rows >= top[None, :]) & (rows < self.y0 + 1)
            self.scene.part[mask] = part
            self.scene.depth[mask] = _FAR * 1.5

    def draw_lots(self, side: int) -> None:
        """Houses, fences, hedges and open ground along one side of the street, and the ends of houses that open ground shows."""
        rng, statistics = self.rng, self.statistics
        starts, kinds, heights = [], [], []
        z = -4.0 * rng.random()
        while z < _FAR:
            kind = int(np.searchsorted(np.cumsum(statistics.lots), rng.random() * sum(statistics.lots), side="right"))
            starts.append(z)
            kinds.append(kind)
            heights.append(self.uniform((statistics.house_height, (1.0, 2.0), (1.2, 3.2), (0.0, 0.0))[kind]))
            z += self.uniform(((7.0, 20.0), (6.0, 14.0), (4.0, 12.0), (3.0, 9.0))[kind])
        columns = np.flatnonzero(self.u * side > self.front[side] / _FAR)
        if not len(columns):
            return
        distance = self.front[side] / (self.u[columns] * side)
        lot = np.searchsorted(np.asarray(starts, np.float32), distance, side="right") - 1
        for k in np.unique(lot)[::-1]:
            here = lot == k
            if kinds[k] != 0 and k + 1 < len(kinds) and kinds[k + 1] == 0:
                self._draw_house_end(side, columns[here], starts[k + 1], heights[k + 1])
            if kinds[k] == 3:
                continue
            self._draw_front(side, kinds[k], columns[here], distance[here], heights[k])

    def _draw_front(self, side: int, kind: int, columns: np.ndarray, distance: np.ndarray, height: float) -> None:
        name = ("house", "fence", "hedge")[kind]
        part = self.part(name, side=side)
        tall = np.full(len(columns), height, np.float32)
        if name == "hedge":
            tall += 0.5 * self.rng.random(len(columns), dtype=np.float32)
        self._fill(part, columns, distance, tall)
        if name == "fence" and self.rng.random() < 0.6:
            gap = (distance * 2 % 1 < 0.3)[None, :]
            self._refill(part, self.part("slat", side=side), columns, gap)
        if name == "house":
            self._draw_windows(part, side, columns, distance[None, :], height)

    def _draw_house_end(self, side: int, columns: np.ndarray, z: float, height: float) -> None:
        depth_of_house = self.uniform((8.0, 14.0))
        columns = columns[self.u[columns] * side * z < self.front[side] + depth_of_house]
        if z <= 1 or not len(columns):
            return
        part = self.part("house_end")
        distance = np.full(len(columns), z, np.float32)
        self._fill(part, columns, distance, np.full(len(columns), height, np.float32), across=self.u[columns] * z)
        if self.rng.random() < 0.5:
            self._draw_windows(part, 0, columns, (self.u[columns] * z)[None, :], height)

    def _draw_windows(self, part: int, side: int, columns: np.ndarray, along: np.ndarray, height: float) -> None:
        rng = self.rng
        period, storey, wide, tall = (
            self.uniform((1.8, 3.6)),
            self.uniform((2.6, 3.6)),
            self.uniform((0.3, 0.65)),
            self.uniform((0.35, 0.6)),
        )
        above = self.scene.along[:, columns]  # height over the ground on these surfaces
        pane = (
            ((along * (1 / period) + rng.random()) % 1 < wide)
            & (above * (1 / storey) % 1 > 1 - tall)
            & (above < height - 0.5)
        )
        self._refill(part, self.part("window", side=side), columns, pane)

    def _fill(
        self, part: int, columns: np.ndarray, distance: np.ndarray, height: np.ndarray, across: np.ndarray | None = None
    ) -> None:
        """An upright surface: these columns, from the ground up to `height`, at `distance`."""
        scene = self.scene
        above = self.eye - self.v[:, None] * distance[None, :]
        rows, cols = np.nonzero((above >= 0) & (above < height[None, :]))
        at = (rows, columns[cols])
        scene.part[at] = part
        scene.depth[at] = distance[cols]
        scene.across[at] = (distance if across is None else across)[cols]
        scene.along[at] = above[rows, cols]

    def _refill(self, part: int, by: int, columns: np.ndarray, mask: np.ndarray) -> None:
        area = self.scene.part[:, columns]
        self.scene.part[:, columns] = np.where((area == part) & mask, np.uint8(by), area)

    # ---- things that stand in the street ----

    def draw_objects(self) -> None:
        """Cars, people, poles and trees from far to near, so that near ones hide far ones."""
        things = [*self._place_cars(), *self._place_people(), *self._place_poles(), *self._place_trees()]
        things.sort(key=lambda thing: -thing[0])
        image = Image.fromarray(self.scene.part)
        self.pen = ImageDraw.Draw(image)
        first = len(self.scene.kinds)
        depth_of = []
        for z, draw, *arguments in things:
            draw(z, *arguments)
            depth_of += [z] * (len(self.scene.kinds) - first - len(depth_of))
        part = np.asarray(image)
        upright = part >= first
        table = np.zeros(256, np.float32)
        table[first : first + len(depth_of)] = depth_of
        self.scene.part = part.copy()
        self.scene.depth = np.where(upright, table[part], self.scene.depth)

    def _count(self, span: tuple[int, int]) -> int:
        return int(self.rng.integers(span[0], span[1] + 1))

    def _place_cars(self) -> list:
        """Parked at the kerbs, or driving in the lane of either side."""
        cars = []
        for _ in range(self._count(self.statistics.cars)):
            side = 1 if self.rng.random() < 0.5 else -1
            x = self.edge[side] - 1.1 if self.rng.random() < 0.6 else self.edge[side] * 0.45
            z = 4.5 + 40 * self.rng.random() * self.rng.random()
            if all(abs(z - other[0]) > 5 or abs(side * x - other[2]) > 2 for other in cars):
                cars.append((z, self._draw_car, side * x))
        return cars

    def _place_people(self) -> list:
        people = []
        for _ in range(self._count(self.statistics.people)):
            side = 1 if self.rng.random() < 0.5 else -1
            if self.rng.random() < 0.85:
                x = self.edge[side] + (self.walk[side] - self.edge[side]) * (0.2 + 0.6 * self.rng.random())
            else:
                x = self.edge[side] * self.rng.random()
            people.append((4.0 + 22 * self.rng.random() * self.rng.random(), self._draw_person, side * x))
        return people

    def _place_poles(self) -> list:
        poles = []
        for side in (-1, 1):
            gap = self.uniform(self.statistics.pole_gap)
            z = 3.0 + gap * self.rng.random()
            height, arm = self.uniform((4.5, 8.0)), self.rng.random() < 0.5
            while z < 60:
                poles.append((z, self._draw_pole, side, height, arm))
                z += gap * (0.8 + 0.4 * self.rng.random())
        return poles

    def _place_trees(self) -> list:
        trees = []
        for _ in range(self._count(self.statistics.trees)):
            side = 1 if self.rng.random() < 0.5 else -1
            x = self.walk[side] + (self.front[side] - self.walk[side]) * self.rng.random() - 0.4
            trees.append((5.0 + 45 * self.rng.random(), self._draw_tree, side * x))
        return trees

    def _px(self, x: float, y: float, z: float) -> tuple[float, float]:
        return self.x0 + self.focal * x / z, self.y0 + self.focal * (self.eye - y) / z

    def _box(self, part: int, x0: float, x1: float, y0: float, y1: float, z: float) -> None:
        (left, bottom), (right, top) = self._px(x0, y0, z), self._px(x1, y1, z)
        self.pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=part)

    def _oval(self, part: int, x: float, y: float, rx: float, ry: float, z: float) -> None:
        cx, cy = self._px(x, y, z)
        rx, ry = self.focal * rx / z, self.focal * ry / z
        if rx >= 0.5:
            self.pen.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=part)

    def _shape(self, part: int, *corners: tuple[float, float, float]) -> None:
        self.pen.polygon([self._px(*corner) for corner in corners], fill=part)

    def _draw_car(self, z: float, x: float) -> None:
        group = self.next_group
        self.next_group += 1
        shadow, body, flank = self.part("shadow"), self.part("car", group=group), self.part("car_side", group=group)
        glass, tyre, lamp = self.part("glass"), self.part("tyre"), self.part("lamp")
        half, belt, roof, length = 0.9, self.uniform((0.8, 1.0)), self.uniform((1.35, 1.75)), self.uniform((3.6, 4.8))
        inner = x - half if x > 0 else x + half  # the flank that the camera sees
        sees_flank = abs(x) > half
        end = z + length
        self._shape(
            shadow,
            (x - half - 0.15, 0, z - 0.1),
            (x + half + 0.15, 0, z - 0.1),
            (x + half + 0.15, 0, end),
            (x - half - 0.15, 0, end),
        )
        if sees_flank:
            cabin = inner + (0.12 if x > 0 else -0.12)
            self._shape(flank, (inner, 0.25, z), (inner, belt, z), (inner, belt, end), (inner, 0.25, end))
            self._shape(flank, (inner, belt, z), (cabin, belt, z + 0.5), (cabin, belt, end - 0.6), (inner, belt, end))
            self._shape(
                flank,
                (cabin, belt, z + 0.5),
                (cabin, roof, z + 0.9),
                (cabin, roof, end - 1.0),
                (cabin, belt, end - 0.6),
            )
            self._shape(
                glass,
                (cabin, belt, z + 0.9),
                (cabin, roof - 0.15, z + 1.1),
                (cabin, roof - 0.15, end - 1.2),
                (cabin, belt, end - 1.0),
            )
            for wheel in (z + 0.75, end - 0.75):
                self._oval(tyre, inner, 0.32, 0.3 * (0.35 + 0.4 * min(abs(inner) / 3, 1)), 0.32, wheel)
        self._shape(
            body,
            (x - half + 0.1, belt, z + 0.3),
            (x - half + 0.22, roof, z + 0.6),
            (x + half - 0.22, roof, z + 0.6),
            (x + half - 0.1, belt, z + 0.3),
        )
        self._shape(
            glass,
            (x - half + 0.2, belt, z + 0.3),
            (x - half + 0.3, roof - 0.12, z + 0.55),
            (x + half - 0.3, roof - 0.12, z + 0.55),
            (x + half - 0.2, belt, z + 0.3),
        )
        self._shape(
            body,
            (x - half, belt, z),
            (x - half + 0.1, belt, z + 0.3),
            (x + half - 0.1, belt, z + 0.3),
            (x + half, belt, z),
        )
        for tyre_x in (x - half + 0.2, x + half - 0.2):
            self._box(tyre, tyre_x - 0.12, tyre_x + 0.12, 0, 0.4, z)
        self._box(body, x - half, x + half, 0.22, belt, z)
        for lamp_x in (x - half + 0.2, x + half - 0.2):
            self._box(lamp, lamp_x - 0.12, lamp_x + 0.12, belt - 0.3, belt - 0.12, z)

    def _draw_person(self, z: float, x: float) -> None:
        coat, legs, skin = self.part("coat"), self.part("legs"), self.part("skin")
        tall, wide, step = self.uniform((1.55, 1.9)), self.uniform((0.21, 0.3)), self.uniform((0.0, 0.2))
        self._shape(legs, (x - 0.13, 0.85, z), (x + 0.13, 0.85, z), (x + 0.08 + step, 0, z), (x - 0.08 + step, 0, z))
        self._shape(legs, (x - 0.13, 0.85, z), (x + 0.13, 0.85, z), (x + 0.08 - step, 0, z), (x - 0.08 - step, 0, z))
        self._oval(coat, x, (0.75 + tall - 0.25) / 2, wide, (tall - 0.25 - 0.75) / 2 + 0.05, z)
        self._oval(skin, x, tall - 0.14, 0.11, 0.14, z)

    def _draw_pole(self, z: float, side: int, height: float, arm: bool) -> None:
        part = self.part("pole")
        x, half = side * (self.edge[side] + 0.45), 0.11
        self._box(part, x - half, x + half, 0, height, z)
        if arm:
            tip = x - side * 1.4
            self._box(part, min(x, tip), max(x, tip), height - 0.18, height, z)

    def _draw_tree(self, z: float, x: float) -> None:
        trunk, group = self.part("trunk"), self.next_group
        self.next_group += 1
        shade, light = self.part("crown", group=group), self.part("crown_light", group=group)
        base, radius = self.uniform((1.6, 3.0)), self.uniform((1.2, 2.4))
        self._box(trunk, x - 0.16, x + 0.16, 0, base + 0.5, z)
        for index in range(9):
            dx, dy, r = (
                radius * (self.rng.random() - 0.5),
                radius * self.rng.random(),
                radius * (0.35 + 0.3 * self.rng.random()),
            )
            self._oval(light if index > 5 else shade, x + dx, base + 0.5 * radius + dy, r, r, z)
