"""What lines the street: on each side a back row of houses, open ground and side streets, and a front row of walls, fences, railings and
hedges."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .street import AHEAD, FAR, LEFT, RIGHT, Block, Street


@dataclass
class Lot:
    """A piece of one side of the street, from z = start to end, its front `front` metres from the middle."""

    kind: str
    start: float
    end: float
    front: float
    height: float = 0.0


@dataclass
class Row:
    """One side of the street. yard: what the ground behind the sidewalk is; verge: how far grass reaches from the kerb, 0: none."""

    lots: list[Lot] = field(default_factory=list)
    fronts: list[Lot] = field(default_factory=list)
    yard: str = "sidewalk"
    verge: float = 0.0


@dataclass(frozen=True)
class Quarter:
    """A kind of neighbourhood: shares of what stands in the back and in the front row; ranges in metres."""

    back: dict[str, float]
    front: dict[str, float]
    setback: tuple[float, float]
    height: tuple[float, float]
    length: tuple[float, float]
    shops: float  # probability that a house has one
    yard_green: float  # probability that the ground behind the sidewalk is grass
    verge: float  # probability of grass at the kerb
    trees: tuple[int, int]  # behind the front row


QUARTERS: dict[str, Quarter] = {
    "town": Quarter(
        {"house": 0.86, "street": 0.09, "open": 0.05}, {"open": 1.0}, (0.0, 0.3), (7.0, 18.0), (5.0, 16.0), 0.6, 0.05, 0.03, (0, 1)
    ),
    "terraces": Quarter(
        {"house": 0.85, "street": 0.09, "open": 0.06}, {"open": 0.45, "wall": 0.25, "hedge": 0.14, "railing": 0.12, "fence": 0.04},
        (0.8, 3.0), (6.0, 11.0), (5.0, 12.0), 0.08, 0.3, 0.05, (0, 3),
    ),
    "suburb": Quarter(
        {"house": 0.55, "open": 0.35, "street": 0.10}, {"open": 0.25, "wall": 0.22, "hedge": 0.27, "fence": 0.20, "railing": 0.06},
        (4.0, 11.0), (4.5, 8.5), (7.0, 16.0), 0.0, 0.75, 0.3, (2, 6),
    ),
    "park": Quarter(
        {"open": 0.80, "house": 0.10, "street": 0.10}, {"open": 0.36, "railing": 0.22, "wall": 0.14, "hedge": 0.16, "fence": 0.12},
        (8.0, 22.0), (4.0, 9.0), (8.0, 22.0), 0.0, 0.85, 0.35, (4, 11),
    ),
    "works": Quarter(
        {"house": 0.45, "open": 0.42, "street": 0.13}, {"open": 0.45, "fence": 0.22, "wall": 0.18, "railing": 0.15},
        (3.0, 18.0), (4.0, 8.0), (12.0, 36.0), 0.2, 0.3, 0.12, (1, 5),
    ),
}  # fmt: skip
_SHARES = {"town": 0.50, "terraces": 0.20, "suburb": 0.13, "park": 0.10, "works": 0.07}
_FRONT_HEIGHT = {"wall": (0.7, 2.2), "fence": (0.9, 2.0), "railing": (0.9, 1.5), "hedge": (0.9, 2.8)}


def plan_row(street: Street, side: int) -> tuple[Row, Quarter]:
    """What stands on one side."""
    quarter = QUARTERS[street.weighted(_SHARES)]
    row = Row(yard="verge" if street.chance(quarter.yard_green) else "sidewalk")
    width = street.walk[side] - street.edge[side]
    row.verge = street.uniform(0.4, 0.6) * width if street.chance(quarter.verge) else 0.0
    setback, height, z = street.uniform(*quarter.setback), street.uniform(*quarter.height), -street.uniform(0, 10)
    while z < FAR:
        kind = street.weighted(quarter.back)
        kind = "open" if kind == "street" and row.lots and row.lots[-1].kind == "street" else kind
        length = street.uniform(6.0, 9.0) if kind == "street" else street.uniform(*quarter.length)
        if street.chance(0.5):
            height = street.uniform(*quarter.height)
        front = (
            street.walk[side] + setback + (max(setback, 1) * street.uniform(-0.3, 0.5) if street.chance(0.4) else 0.0)
        )
        if kind == "open" and street.chance(0.6):  # a house far back
            kind, front = "house", front + street.uniform(8, 30)
        front = max(front, street.walk[side] + 0.05)
        row.lots.append(Lot(kind, z, z + length, front, height if kind == "house" else 0.0))
        if kind != "street":
            row.fronts += _front_lots(street, quarter, side, z, z + length)
        z += length
    return row, quarter


def _front_lots(street: Street, quarter: Quarter, side: int, start: float, end: float) -> list[Lot]:
    lots = []
    while start < end - 1:
        kind, stop = street.weighted(quarter.front), min(start + street.uniform(4, 14), end)
        if kind != "open":
            lots.append(Lot(kind, start, stop, street.walk[side] + 0.02, street.uniform(*_FRONT_HEIGHT[kind])))
        start = stop
    return lots


# ---- the back row ----


def draw_back_row(street: Street, side: int, row: Row, quarter: Quarter) -> None:
    for lot in reversed(row.lots):
        if lot.kind == "house":
            _draw_house(street, side, lot, shop=street.chance(quarter.shops))


def _facing(side: int) -> int:
    return LEFT if side < 0 else RIGHT


def _front_block(
    street: Street, side: int, lot: Lot, height: float | None = None, base: float = 0.0, set_back: float = 0.0
) -> Block | None:
    z = street.hit(side, lot.front + set_back)
    columns = np.flatnonzero((z >= max(lot.start, 0.5)) & (z < lot.end))
    return street.block(
        columns, z[columns], np.full(len(columns), lot.height if height is None else height, np.float32), base
    )


def _draw_house(street: Street, side: int, lot: Lot, *, shop: bool) -> None:
    """Roof, the end that faces the camera, and the front with its openings."""
    colours, plan = street.group(), _Openings(street, lot.height, shop)
    gabled = street.chance(0.25)
    if not gabled and street.chance(0.75):
        rise = street.uniform(1.0, 3.2)
        roof = _front_block(street, side, lot, lot.height + rise, set_back=street.uniform(1.0, 3.5))
        if roof:
            roof.fill(street.part("house", group=colours, facing=_facing(side)))
            roof.fill(street.part("roof", facing=_facing(side)), roof.above > lot.height - 0.3)
        for _ in range(int(street.rng.integers(0, 5))):
            _draw_chimney(street, side, lot, rise, colours)
    _draw_end(street, side, lot, colours, plan)
    block = _front_block(street, side, lot, lot.height + (2.5 if gabled else 0))
    if block is None:
        return
    along = block.z - np.float32(lot.start)
    if gabled:
        middle = np.float32((lot.end - lot.start) / 2)
        block.inside &= (
            block.above
            < (np.float32(lot.height + 2.5) - np.abs(along - middle) * np.float32(5 / (lot.end - lot.start)))[None, :]
        )
    block.fill(street.part("house", group=colours, facing=_facing(side)))
    plan.draw(block, along, _facing(side))
    _draw_clutter(street, block, along, lot, colours, _facing(side))


def _draw_end(street: Street, side: int, lot: Lot, colours: int, plan: _Openings) -> None:
    if lot.start < 1:
        return
    depth = street.uniform(7, 14)
    beyond = street.across(lot.start) * np.float32(side)
    columns = np.flatnonzero((beyond > lot.front) & (beyond < lot.front + depth))
    along = beyond[columns] - np.float32(lot.front)
    rise = street.uniform(0, 3)
    tall = np.float32(lot.height + rise) - np.abs(along - np.float32(depth / 2)) * np.float32(2 * rise / depth)
    block = street.block(columns, np.full(len(columns), lot.start, np.float32), tall)
    if block:
        block.fill(street.part("house", group=colours, facing=AHEAD))
        if street.chance(0.5):
            plan.draw(block, along, AHEAD)


def _draw_chimney(street: Street, side: int, lot: Lot, rise: float, colours: int) -> None:
    start, top = street.uniform(lot.start, lot.end - 0.9), lot.height + rise * street.uniform(0.4, 1.0) + 0.5
    stack = Lot("chimney", start, start + street.uniform(0.6, 1.2), lot.front, top)
    if block := _front_block(street, side, stack, base=lot.height - 0.2):
        block.fill(street.part("house", group=colours, facing=AHEAD))


def _draw_clutter(street: Street, block: Block, along: np.ndarray, lot: Lot, colours: int, facing: int) -> None:
    """What breaks a front's order: pipes, boards, vents, blinds, bricked-up openings, stains, each a rectangle."""
    length = lot.end - lot.start
    bounds = street.rng.random((int(street.rng.integers(3, 16)), 5)).tolist()
    for index, (a, b, c, d, e) in enumerate(bounds):
        pipe = e < 0.25
        wide, tall = (0.12, lot.height) if pipe else (0.3 + 2.2 * c * c, 0.2 + 1.6 * d * d)
        low = (
            0.0 if pipe else b * max((lot.height if index % 2 else 3.0) - tall, 0.0)
        )  # every other one at street level
        kind = street.pick(("trim", "pane", "door", "house", "frame", "fascia", "shop_pane"))
        part = street.part(kind, group=colours if pipe and b < 0.3 else None, facing=AHEAD if b < 0.3 else facing)
        columns = np.flatnonzero((along > a * length) & (along < a * length + wide))
        if len(columns):
            strip = block.columns(slice(int(columns[0]), int(columns[-1]) + 1))
            strip.fill(part, (strip.above > low) & (strip.above < low + tall))


class _Openings:
    """Windows, doors and shop fronts of one house, the same for its front and its ends."""

    def __init__(self, street: Street, height: float, shop: bool):
        self.street, self.height, self.shop = street, height, shop
        uniform = street.uniform
        self.storey, self.ground = uniform(2.7, 3.5), uniform(2.8, 4.2) if shop else uniform(2.6, 3.0)
        self.period, self.phase = uniform(1.5, 3.4), street.rng.random()
        self.wide, self.sill, self.head = uniform(0.28, 0.7), uniform(0.2, 0.35), uniform(0.75, 0.92)
        self.framed, self.banded = street.chance(0.7), street.chance(0.35)
        self.door_every = int(street.rng.integers(2, 5))
        self.mix, self.blinds = (street.rng.random(), street.rng.random()), street.uniform(0, 0.6)
        self.groups = [street.group() for _ in range(7)]

    def draw(self, block: Block, along: np.ndarray, facing: int) -> None:
        """along: metres along the surface, float32 [columns]."""
        frame, pane, blind, trim, door, glass, fascia = (
            self.street.part(kind, group=group, facing=facing)
            for kind, group in zip(
                ("frame", "pane", "pane", "trim", "door", "shop_pane", "fascia"), self.groups, strict=True
            )
        )
        above, ground = block.above, np.float32(self.ground if self.shop else 0)
        cell = along * np.float32(1 / self.period) + np.float32(self.phase)
        off = np.abs(cell % 1 - np.float32(0.5))[None, :]
        level = (above - ground) * np.float32(1 / self.storey)
        part_of_level = level % 1
        upper = (above > ground) & (
            level < np.float32(int((self.height - self.ground * self.shop) / self.storey + 0.15))
        )
        if self.framed:
            rim = np.float32(0.09 / self.period)
            block.fill(
                frame,
                upper
                & (off < self.wide / 2 + rim)
                & (part_of_level > self.sill - 0.04)
                & (part_of_level < self.head + 0.03),
            )
        glazed = upper & (off < self.wide / 2) & (part_of_level > self.sill) & (part_of_level < self.head)
        block.fill(pane, glazed)
        mixed = (
            np.floor(cell) * np.float32(self.mix[0]) + np.floor(level) * np.float32(self.mix[1])
        ) % 1  # another for each window
        block.fill(
            blind, glazed & (mixed < self.blinds) & (part_of_level > np.float32(self.sill) + mixed * np.float32(0.5))
        )
        if self.framed:
            bar = np.float32(0.03 / self.period)
            block.fill(frame, upper & (off < bar) & (part_of_level > self.sill) & (part_of_level < self.head))
        if self.banded:
            block.fill(trim, (part_of_level < 0.05) & (above > 2) | (above > self.height - 0.3) & (above < self.height))
        if self.shop:
            self._draw_shop(block, along, glass, fascia, trim)
        else:
            block.fill(
                door, (np.floor(cell) % self.door_every == 0)[None, :] & (off < 0.5 / self.period) & (above < 2.1)
            )

    def _draw_shop(self, block: Block, along: np.ndarray, glass: int, fascia: int, trim: int) -> None:
        above, sign = block.above, self.ground - 0.75
        block.fill(trim, above < sign)
        bay = (along * np.float32(1 / 2.2) + np.float32(self.phase)) % 1
        block.fill(glass, (bay > 0.06)[None, :] & (above > 0.45) & (above < sign - 0.1))
        block.fill(fascia, (above > sign) & (above < self.ground))


# ---- the front row ----


def draw_front_row(street: Street, side: int, row: Row) -> None:
    """Walls, fences, railings and hedges from far to near, and a railing at the kerb now and then."""
    for lot in reversed(row.fronts):
        _FRONTS[lot.kind](street, side, lot)
    if street.chance(0.12):
        start = street.uniform(2, 20)
        _draw_railing(
            street, side, Lot("railing", start, start + street.uniform(6, 25), street.edge[side] + 0.35, 1.05)
        )


def _draw_wall(street: Street, side: int, lot: Lot) -> None:
    if block := _front_block(street, side, lot):
        block.fill(street.part("wall", facing=_facing(side)))
        if street.chance(0.6):
            block.fill(street.part("coping", facing=_facing(side)), block.above > lot.height - 0.12)


def _draw_fence(street: Street, side: int, lot: Lot) -> None:
    """Boards, with dark gaps between them."""
    if block := _front_block(street, side, lot):
        group = street.group()
        block.fill(street.part("fence", group=group, facing=_facing(side)))
        if street.chance(0.7):
            gaps = (block.z * np.float32(1 / street.uniform(0.12, 0.3))) % 1 < 0.22
            block.fill(street.part("fence", facing=_facing(side)), gaps[None, :] & (block.above < lot.height - 0.05))


def _draw_hedge(street: Street, side: int, lot: Lot) -> None:
    if block := _front_block(street, side, lot, lot.height + 0.4):
        ragged = street.rng.random(len(block.z), dtype=np.float32)
        block.inside &= block.above < (np.float32(lot.height) + np.float32(0.35) * ragged)[None, :]
        block.fill(street.part("hedge", facing=_facing(side)))


def _draw_railing(street: Street, side: int, lot: Lot) -> None:
    """A fence from the ground up in the labels; the picture shows its bars and what is behind."""
    block = _front_block(street, side, lot)
    if block is None:
        return
    block.name(street.part("railing", facing=_facing(side)))
    period = street.uniform(0.11, 0.2)
    metres_px = block.z * block.z * np.float32(1 / (street.focal * lot.front))  # of the surface in one pixel's width
    bars = ((block.z * np.float32(1 / period)) % 1 < np.maximum(np.float32(0.2), metres_px * np.float32(0.4 / period)))[
        None, :
    ]
    posts = ((block.z * np.float32(1 / 2.0)) % 1 < 0.05)[None, :]
    bands = (block.above > lot.height - 0.07) | (np.abs(block.above - np.float32(0.15)) < 0.03)
    rail = street.part("rail", facing=_facing(side))
    mask = block.inside & (bands | posts | bars & (block.z < 30)[None, :])
    block.show(rail, mask)
    block.scene.part[block.at][mask] = rail


_FRONTS = {"wall": _draw_wall, "fence": _draw_fence, "hedge": _draw_hedge, "railing": _draw_railing}
