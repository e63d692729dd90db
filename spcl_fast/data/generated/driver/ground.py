"""Sky, skyline and the ground: road with its markings, kerbs, sidewalks, and what lies behind them."""

from __future__ import annotations

import numpy as np

from .lots import Row
from .street import AHEAD, FAR, FLAT, Street, Thing

_SIDES = (-1, 1)


def draw_sky_and_skyline(street: Street) -> None:
    """Sky everywhere, and far houses and trees on the horizon as steps of random height and width."""
    scene, rng = street.scene, street.rng
    sky = street.part("sky", facing=AHEAD)
    scene.part[:] = scene.seen[:] = sky
    scene.depth[:] = 1000
    line = street.y0
    lines = np.arange(street.height)[:, None]
    layers = [
        ("skyline", street.uniform(0.06, 0.14), 0.015),
        ("far_trees", street.uniform(0.0, 0.07), 0.006),
        ("skyline", 0.03, 0.02),
    ]
    if street.chance(0.4):
        layers = [layers[1], layers[0], layers[2]]
    for kind, tallest, narrow in layers:
        part = street.part(kind)
        narrow_px = max(1, round(narrow * street.width))
        steps = rng.integers(narrow_px, narrow_px * 4, size=street.width // narrow_px + 1)
        heights = tallest * rng.random(len(steps)) * (rng.random(len(steps)) < 0.8)
        top = line - np.repeat(heights, steps)[: street.width] * street.height
        mask = (lines >= top[None, :]) & (lines < line + 1)
        scene.part[mask] = scene.seen[mask] = part
        scene.depth[mask] = FAR * 1.3


def draw_ground(street: Street, rows_of_lots: dict[int, Row]) -> None:
    """Everything flat, by its distance from the middle of the street; and the shadows of the houses on it."""
    scene = street.scene
    rows = np.flatnonzero(scene.v > 1e-3)
    z = np.minimum(np.float32(street.eye) / scene.v[rows], np.float32(400))
    s = scene.u[None, :] * z[:, None] - (np.float32(street.bend) * z * z)[:, None]
    ground = np.full(s.shape, street.part("road", facing=FLAT), np.int32)
    _mark(street, ground, s, z)
    for side in _SIDES:
        _pave(street, ground, s * np.float32(side), z, side, rows_of_lots[side])
    scene.part[rows] = scene.seen[rows] = ground
    scene.depth[rows] = z[:, None]
    if not scene.overcast:
        scene.shade[rows] = _house_shadow(street, s, z, rows_of_lots[int(street.sun[0])])


def _mark(street: Street, ground: np.ndarray, s: np.ndarray, z: np.ndarray) -> None:
    """Patches, the line between the directions, lines along the kerbs, a zebra crossing or a stop line."""
    for _ in range(int(street.rng.integers(0, 4))):
        left, near = street.uniform(-4, 4), street.uniform(3, 25)
        along = (z > near) & (z < near + street.uniform(1.5, 12))
        ground[(s > left) & (s < left + street.uniform(0.5, 2.5)) & along[:, None]] = street.part("repair", facing=FLAT)
    marking = street.part("marking", facing=FLAT)
    half = street.uniform(0.05, 0.09)
    if street.chance(0.85):
        period, drawn = street.pick(((6.0, 0.33), (6.0, 0.66), (9.0, 0.44), (4.0, 0.5), (1.0, 2.0)))
        dashes = ((z + street.uniform(0, period)) * np.float32(1 / period)) % 1 < drawn
        ground[(np.abs(s - np.float32(street.centre)) < half) & dashes[:, None]] = marking
        if street.chance(0.15):
            ground[np.abs(s - np.float32(street.centre + 0.25)) < half] = marking
    for side in _SIDES:
        if street.chance(0.55):
            line = marking if street.chance(0.5) else street.part("yellow_line", facing=FLAT)
            beyond = np.float32(street.edge[side] - street.parking[side] * 2.1 - 0.35) - s * np.float32(side)
            lines = np.abs(beyond) < half
            if street.chance(0.4):
                lines |= np.abs(beyond + np.float32(0.2)) < half * 0.8
            ground[lines] = line
    _mark_across(street, ground, s, z, marking)


def _mark_across(street: Street, ground: np.ndarray, s: np.ndarray, z: np.ndarray, marking: int) -> None:
    left, right = -street.edge[-1], street.edge[1]
    if street.chance(0.3):
        near = street.uniform(5, 28)
        stripes = (s * np.float32(1 / 1.1)) % 1 < 0.5
        ground[stripes & (s > left) & (s < right) & ((z > near) & (z < near + 3))[:, None]] = marking
    if street.chance(0.3):
        near = street.uniform(4, 25)
        own = (s * street.traffic > -abs(street.centre)) & (s > left) & (s < right)
        ground[own & ((z > near) & (z < near + street.uniform(0.25, 0.5)))[:, None]] = marking
    if street.chance(0.1):  # a box of crossed lines at a junction
        near = street.uniform(6, 20)
        lattice = np.minimum((s + z[:, None]) * np.float32(0.4) % 1, (s - z[:, None]) * np.float32(0.4) % 1) < 0.07
        inside = (s > left) & (s < right) & ((z > near) & (z < near + 9))[:, None]
        ground[lattice & inside] = street.part("yellow_line", facing=FLAT)


def _pave(street: Street, ground: np.ndarray, beyond: np.ndarray, z: np.ndarray, side: int, row: Row) -> None:
    """Kerb, sidewalk, verge and yards of one side, open where another street comes in. beyond: distance to that side, [rows, W]."""
    edge, walk = np.float32(street.edge[side]), np.float32(street.walk[side])
    open_here = np.zeros(len(z), bool)
    for lot in row.lots:
        if lot.kind == "street":
            open_here |= (z >= lot.start) & (z < lot.end)
    closed = ~open_here[:, None]
    paving = street.group()
    paved = (beyond > edge) & closed
    ground[paved] = street.part("sidewalk", group=paving, facing=FLAT)
    if street.chance(0.6):
        ground[paved & _slab_joints(street, beyond - edge, z)] = street.part("joint", group=paving, facing=FLAT)
    ground[(beyond > edge) & (beyond < edge + np.float32(0.16)) & closed] = street.part("kerb", facing=FLAT)
    if row.verge:
        strip = (beyond > edge + np.float32(0.16)) & (beyond < edge + np.float32(row.verge))
        ground[strip & closed] = street.part("verge", facing=FLAT)
    ground[(beyond > walk) & closed] = street.part(row.yard, facing=FLAT)


def _slab_joints(street: Street, beyond: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Where slabs of one size meet, bool [rows, W]; only near the camera, where the joints are not much narrower than a pixel."""
    wide, long = street.uniform(0.4, 1.0), street.uniform(0.4, 1.0)
    gap = np.float32(0.03) + z * np.float32(0.002)
    joints = (beyond % np.float32(wide) < gap[:, None]) | (z % np.float32(long) < gap)[:, None]
    return joints & (z < 14)[:, None]


def _house_shadow(street: Street, s: np.ndarray, z: np.ndarray, row: Row) -> np.ndarray:
    """uint8 [rows, W]: 255 where a house of the sunny side stands between the ground and the sun."""
    side, reach, skew = street.sun
    edges = np.full(len(z), 1e6, np.float32)
    for lot in row.lots:
        if lot.kind == "house":
            here = (z >= lot.start + skew * lot.height * 0.5) & (z < lot.end + skew * lot.height * 0.5)
            edges[here] = lot.front - reach * lot.height
    return np.where(s * np.float32(side) > edges[:, None], np.uint8(255), np.uint8(0))


def flat_marks(street: Street) -> list[Thing]:
    """Arrows, drain covers: painted before anything stands on them."""
    marks: list[Thing] = []
    if street.chance(0.3):
        z = street.uniform(7, 18)
        marks.append((200.0, lambda: _arrow(street, z)))
    for _ in range(int(street.rng.integers(0, 4))):
        at = street.uniform(-street.edge[-1], street.edge[1]), street.uniform(4, 18)
        marks.append((199.0, lambda at=at: _cover(street, *at)))
    return marks


def _arrow(street: Street, z: float) -> None:
    street.depth_now = z
    part, end = street.part("marking", facing=FLAT), z + street.uniform(2.5, 4.5)
    tip = end + 1.4
    street.shape(part, (-0.08, 0, z), (0.08, 0, z), (0.08, 0, end), (-0.08, 0, end))
    street.shape(part, (-0.4, 0, end), (0.4, 0, end), (0, 0, tip))


def _cover(street: Street, s: float, z: float) -> None:
    street.depth_now = z
    wide, deep = street.pick(((0.35, 0.35), (0.25, 0.45), (0.4, 0.6)))
    street.shape(
        street.part("cover", facing=FLAT),
        (s - wide, 0, z - deep),
        (s + wide, 0, z - deep),
        (s + wide, 0, z + deep),
        (s - wide, 0, z + deep),
    )
