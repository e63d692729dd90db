"""What stands along a street and does not move: trees, lamp posts, signs, traffic lights, bollards."""

from __future__ import annotations

from .lots import Quarter
from .street import Street, Thing


def place_trees(street: Street, quarters: dict[int, Quarter]) -> list[Thing]:
    """Trees behind the front rows."""
    things: list[Thing] = []
    bare = street.uniform(0, 1)
    for side, quarter in quarters.items():
        for _ in range(int(street.rng.integers(quarter.trees[0], quarter.trees[1] + 1))):
            s = side * (street.walk[side] + street.uniform(1.0, max(2.0, quarter.setback[1])))
            things.append(_tree(street, s, 7 + 60 * street.rng.random(), bare, street.uniform(1.5, 4.0)))
    return things


def place_street_trees(street: Street) -> list[Thing]:
    """Rows of trees on the sidewalks, whose crowns hang over the street."""
    things: list[Thing] = []
    bare = street.uniform(0, 1)
    for side in (-1, 1):
        if not street.chance(0.24):
            continue
        gap, size, z = street.uniform(7, 18), street.uniform(1.5, 3.2), street.uniform(5, 16)
        while z < 80:
            if street.chance(0.8):
                things.append(_tree(street, side * (street.edge[side] + 0.7), z, bare, size))
            z += gap * street.uniform(0.8, 1.3)
    return things


def _tree(street: Street, s: float, z: float, bare: float, radius: float) -> Thing:
    draw = _draw_bare_tree if street.chance(bare) else _draw_leafy_tree
    return z, lambda: draw(street, s, z, radius)


def _shadow_of_crown(street: Street, s: float, z: float, base: float, radius: float) -> None:
    """Blotches where the crown keeps the sun away."""
    side, reach, skew = street.sun
    for a, b, c in (street.rng.random((14, 3)) * 2 - 1).tolist():
        height = base + radius * (1 + a)
        at = s - side * reach * height + radius * b, z + skew * height + radius * c
        if at[1] > 2:
            street.oval(
                255, at[0], 0, radius * 0.45, radius * 0.45 * street.eye / at[1], at[1], pens=(street.shade_pen,)
            )


def _trunk(street: Street, s: float, z: float, height: float, radius: float) -> None:
    part, thick = street.part("trunk"), street.uniform(0.05, 0.09) * radius
    street.shape(part, (s - thick * 1.3, 0, z), (s - thick, height, z), (s + thick, height, z), (s + thick * 1.3, 0, z))


def _draw_leafy_tree(street: Street, s: float, z: float, radius: float) -> None:
    """A crown of clumps in three tones, lighter towards the top, with ragged rims."""
    base, tall = street.uniform(1.6, 3.2), street.uniform(0.8, 1.5)
    _shadow_of_crown(street, s, z, base, radius)
    _trunk(street, s, z, base + radius, radius)
    tones = [street.part(kind) for kind in ("crown_dark", "crown", "crown_light")]
    size_px = street.focal * radius / z
    for index, (a, b, c, d) in enumerate(street.rng.random((30 + min(int(1.5 * size_px), 240), 4)).tolist()):
        a, b = 2 * a - 1, 2 * b - 1
        clump = index < 30
        if a * a + b * b > (0.6 if clump else 1.05):
            a, b = a * 0.6, b * 0.6
        r = radius * ((0.18 + 0.22 * c) if clump else (0.03 + 0.06 * c))
        tone = tones[0 if b + 2 * d < 0.3 else 1 if b + 2 * d < 1.6 else 2]
        street.oval(tone, s + radius * a, base + radius * tall * (1 + b), r, r * 0.85, z)


def _draw_bare_tree(street: Street, s: float, z: float, radius: float) -> None:
    """Twigs against what is behind; the labels fill the crown, as people who label photographs do."""
    base = street.uniform(1.8, 3.5)
    _shadow_of_crown(street, s, z, base, radius * 0.6)
    hull, twigs = street.part("airy_crown"), street.part("twigs")
    tall = radius * street.uniform(1.0, 1.5)
    labels = (street.label_pen,)
    street.oval(hull, s, base + tall, radius * 0.9, tall * 0.9, z, pens=labels)
    for a, b in (street.rng.random((5, 2)) * 2 - 1).tolist():
        street.oval(hull, s + a * radius * 0.55, base + tall * (1 + b * 0.55), radius * 0.5, tall * 0.5, z, pens=labels)
    _trunk(street, s, z, base + tall * 0.4, radius)
    _branch(street, twigs, (s, base * 0.8, z), (0.0, tall * 0.9), radius * 0.06, 0)
    size_px = street.focal * radius / z
    for a, b, c, d in (street.rng.random((60 + min(int(1.5 * size_px), 260), 4)) * 2 - 1).tolist():
        if a * a + b * b < 1:
            start = (s + a * radius * 0.9, base + tall * (1 + b * 0.9), z)
            street.rod(
                twigs, start, (start[0] + (a + c) * radius * 0.14, start[1] + (0.5 + d) * radius * 0.16, z), 0.012
            )


def _branch(
    street: Street, part: int, root: tuple[float, float, float], way: tuple[float, float], thick: float, level: int
) -> None:
    """A branch and those that grow from it. way: across and up, in metres."""
    tip = root[0] + way[0], root[1] + way[1], root[2]
    street.rod(part, root, tip, thick)
    if level == 3:
        return
    for a, b, c in street.rng.random((3, 3)).tolist():
        start = root[0] + way[0] * (0.4 + 0.6 * c), root[1] + way[1] * (0.4 + 0.6 * c), root[2]
        size = abs(way[0]) + abs(way[1])
        turned = way[0] * 0.55 + size * (a - 0.5) * 1.1, way[1] * 0.5 + size * (b - 0.3) * 0.4
        _branch(street, part, start, turned, thick * 0.55, level + 1)


# ---- poles, signs, lights ----


def place_poles(street: Street) -> list[Thing]:
    """Lamp posts at regular distances, signs, bollards, and now and then traffic lights."""
    things: list[Thing] = []
    for side in (-1, 1):
        gap, z, height, arm = (
            street.uniform(14, 32),
            street.uniform(4, 24),
            street.uniform(5, 9.5),
            street.uniform(0, 2.2),
        )
        while z < 100 and gap < 29:
            things.append(
                (z, lambda z=z, side=side, height=height, arm=arm: _draw_lamp_post(street, side, z, height, arm))
            )
            z += gap * street.uniform(0.9, 1.1)
        for _ in range(int(street.rng.integers(0, 4))):
            z = 6 + 44 * street.rng.random() * street.rng.random()
            things.append((z, lambda z=z, side=side: _draw_sign_post(street, side, z)))
        if street.chance(0.25):
            z, gap = street.uniform(5, 15), street.uniform(1.4, 2.5)
            things += [
                (z + k * gap, lambda z=z + k * gap, side=side: _draw_bollard(street, side, z))
                for k in range(int(street.rng.integers(3, 9)))
            ]
    if street.chance(0.45):
        z = 6 + 26 * street.rng.random()
        for side in (-1, 1):
            if street.chance(0.85):
                things.append((z, lambda side=side: _draw_traffic_light(street, side, z)))
            if street.chance(0.4):
                things.append((z + 14, lambda side=side: _draw_traffic_light(street, side, z + 14)))
    return things


def _beside(street: Street, side: int, off: float = 0.5) -> float:
    return side * (street.edge[side] + off)


def _post(street: Street, s: float, z: float, height: float, thick: float) -> int:
    part = street.part("pole")
    street.box(part, s - thick / 2, s + thick / 2, 0, height, z)
    side, reach, skew = street.sun
    street.shade_pen.line(
        (*street.px(s, 0, z), *street.px(s - side * reach * height, 0, max(z + skew * height, 2))), fill=255, width=1
    )
    return part


def _draw_lamp_post(street: Street, side: int, z: float, height: float, arm: float) -> None:
    s = _beside(street, side)
    part = _post(street, s, z, height, street.uniform(0.13, 0.2))
    street.box(part, s - 0.13, s + 0.13, 0, 1.1, z)
    tip = s - side * arm
    if arm > 0.3:
        street.rod(part, (s, height, z), (tip, height + 0.25, z), 0.08)
    lantern = street.part("lantern")
    street.box(lantern, tip - 0.35, tip + 0.15, height + 0.12, height + 0.34, z)


def _draw_bollard(street: Street, side: int, z: float) -> None:
    _post(street, _beside(street, side, 0.3), z, street.uniform(0.8, 1.05), 0.13)


def _draw_sign_post(street: Street, side: int, z: float) -> None:
    s, height = _beside(street, side, street.uniform(0.3, 0.7)), street.uniform(2.2, 3.2)
    _post(street, s, z, height, 0.08)
    plates = 1 + street.chance(0.35)
    for k in range(plates):
        _draw_plate(street, s, height - 0.35 - 0.7 * k, z)


def _draw_plate(street: Street, s: float, y: float, z: float) -> None:
    """One sign: round, three-cornered or square, with a rim and a mark; or the back of one."""
    size = street.uniform(0.28, 0.42)
    if street.chance(0.15):
        street.oval(street.part("sign_back"), s, y, size, size, z)
        return
    rim, face, mark = street.part("sign_rim"), street.part("sign"), street.part("sign_mark")
    form = street.pick(("round", "round", "round", "triangle", "triangle", "square", "square", "board"))
    if form == "round":
        street.oval(rim, s, y, size, size, z)
        street.oval(face, s, y, size * 0.76, size * 0.76, z)
    elif form == "triangle":
        for part, r in ((rim, size * 1.15), (face, size * 0.7)):
            street.shape(part, (s - r, y - r * 0.75, z), (s, y + r, z), (s + r, y - r * 0.75, z))
    else:
        wide = size * (1 if form == "square" else street.uniform(1.4, 2.4))
        street.box(face, s - wide, s + wide, y - size, y + size, z)
    street.box(mark, s - size * 0.4, s + size * 0.4, y - size * 0.12, y + size * 0.12, z)


def _draw_traffic_light(street: Street, side: int, z: float) -> None:
    s, height = _beside(street, side, street.uniform(0.3, 0.8)), street.uniform(3.0, 3.6)
    part = _post(street, s, z, height, 0.12)
    _draw_signal(street, s, height - 0.75, z)
    if street.chance(0.25):  # a second one over the lane
        reach = street.uniform(2.0, 4.5)
        street.box(part, s - 0.1, s + 0.1, 0, 5.6, z)
        street.rod(part, (s, 5.5, z), (s - side * reach, 5.6, z), 0.1)
        _draw_signal(street, s - side * reach, 5.0, z)


def _draw_signal(street: Street, s: float, y: float, z: float) -> None:
    """Three lenses in a box, one of them lit, or its back."""
    if street.chance(0.4):
        street.box(street.part("signal_rim"), s - 0.26, s + 0.26, y - 0.55, y + 0.6, z)
    street.box(street.part("signal"), s - 0.2, s + 0.2, y - 0.5, y + 0.54, z)
    if street.chance(0.2):
        return
    lit, dark = int(street.rng.integers(3)), street.part("lens")
    for k, kind in enumerate(("red_light", "amber_light", "green_light")):
        street.oval(street.part(kind) if k == lit else dark, s, y + 0.34 - 0.33 * k, 0.12, 0.12, z)
