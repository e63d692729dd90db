"""Who is on the street: parked and moving vehicles, cyclists, people on foot."""

from __future__ import annotations

from .lots import Row
from .street import Street, Thing
from .vehicles import Vehicle, pick_model

_AWAY, _TOWARDS = (0.0, 1.0), (0.0, -1.0)


def place_traffic(street: Street, rows: dict[int, Row]) -> list[Thing]:
    busy = street.rng.random()
    return [
        *_parked(street),
        *_yards(street, rows),
        *_moving(street),
        *_walkers(street, busy),
        *_cyclists(street, busy),
    ]


def _turned(slope: float, away: bool) -> tuple[float, float]:
    """The heading whose half angle has this tangent, away from the camera or towards it; exact on every machine."""
    across, along = 2 * slope / (1 + slope * slope), (1 - slope * slope) / (1 + slope * slope)
    return (across, along) if away else (-across, -along)


def _thing(vehicle: Vehicle, z: float) -> Thing:
    return z, vehicle.draw


def _parked(street: Street) -> list[Thing]:
    """Rows along the kerbs, with gaps."""
    things: list[Thing] = []
    for side in (-1, 1):
        if not street.parking[side]:
            continue
        full, z = street.uniform(0.45, 0.95), street.uniform(1.5, 7)
        while z < 75:
            away = (side == street.traffic) != street.chance(0.15)
            s = side * (street.edge[side] - street.uniform(0.95, 1.2))
            car = Vehicle.nearest_at(
                street, pick_model(street, parked=True), s, z, _turned(street.uniform(-0.02, 0.02), away)
            )
            if street.chance(full):
                things.append(_thing(car, z))
            z += car.length + street.uniform(0.5, 2.2)
    return things


def _yards(street: Street, rows: dict[int, Row]) -> list[Thing]:
    """Cars on open ground next to the street and in side streets, at any angle."""
    things: list[Thing] = []
    for side, row in rows.items():
        for lot in row.lots:
            deep = lot.front > street.walk[side] + 8 or lot.kind == "open"
            if lot.kind != "street" and deep and row.yard == "sidewalk" and lot.start > 6 and street.chance(0.35):
                z = lot.start + 1.5
                while z < min(lot.end, 50):
                    s = side * (street.walk[side] + street.uniform(2.5, 6.0))
                    slope = street.pick((1.0, -1.0)) * street.uniform(0.8, 1.2)
                    things.append(
                        _thing(Vehicle(street, pick_model(street, parked=True), s, z, _turned(slope, True)), z)
                    )
                    z += street.uniform(2.6, 4.5)
            if lot.kind == "street" and lot.start > 5 and street.chance(0.35):
                s = side * (street.edge[side] + street.uniform(2, 9))
                z = (lot.start + lot.end) / 2 + street.uniform(-2, 2)
                car = Vehicle(street, pick_model(street, parked=False), s, z, _turned(street.pick((1.0, -1.0)), True))
                things.append(_thing(car, z))
    return things


def _moving(street: Street) -> list[Thing]:
    """Ahead in the own lane, oncoming in the other, and one that turns now and then."""
    things: list[Thing] = []
    z = 6 + 30 * street.rng.random()
    while z < 80 and street.chance(0.62):
        car = Vehicle.nearest_at(
            street,
            pick_model(street, parked=False),
            street.uniform(-0.4, 0.4),
            z,
            _turned(street.uniform(-0.03, 0.03), True),
        )
        things.append(_thing(car, z))
        z += car.length + street.uniform(3, 25)
    z = 5 + 30 * street.rng.random()
    lane = street.centre - street.traffic * street.lane / 2
    while z < 90 and street.chance(0.68):
        car = Vehicle.nearest_at(
            street,
            pick_model(street, parked=False),
            lane + street.uniform(-0.3, 0.3),
            z,
            _turned(street.uniform(-0.03, 0.03), False),
        )
        things.append(_thing(car, z))
        z += car.length + street.uniform(3, 25)
    if street.chance(0.12):
        z = street.uniform(9, 25)
        slope = street.pick((1.0, -1.0)) * street.uniform(0.35, 1.1)
        things.append(
            _thing(
                Vehicle(
                    street,
                    pick_model(street, parked=False),
                    street.uniform(-3, 3),
                    z,
                    _turned(slope, street.chance(0.5)),
                ),
                z,
            )
        )
    return things


# ---- people ----


def _walkers(street: Street, busy: float) -> list[Thing]:
    """On the sidewalks, in pairs or alone, and some who cross."""
    things: list[Thing] = []
    for _ in range(int(street.rng.integers(0, 3 + int(12 * busy)))):
        side = street.pick((-1, 1))
        z = 5 + 34 * street.rng.random() * street.rng.random()
        if street.chance(0.9):
            s = side * (street.edge[side] + 0.3 + (street.walk[side] - street.edge[side] - 0.5) * street.rng.random())
        else:
            s, z = side * street.edge[side] * street.rng.random(), z + 3
        for _ in range(1 + street.chance(0.35)):
            things.append((z, lambda s=s, z=z: draw_person(street, s, z)))
            s, z = s + street.uniform(0.45, 0.7), z + street.uniform(-0.2, 0.2)
    return things


def _shade_figure(street: Street, s: float, z: float, tall: float) -> None:
    street.oval(150, s, 0, 0.35, 0.3 * street.eye / z, z, pens=(street.under_pen,))
    side, reach, skew = street.sun
    tip = s - side * reach * tall, max(z + skew * tall, 2)
    street.shadow(
        (s - 0.15, 0, z - 0.1), (s + 0.15, 0, z + 0.1), (tip[0] + 0.15, 0, tip[1]), (tip[0] - 0.15, 0, tip[1])
    )


def draw_person(street: Street, s: float, z: float) -> None:
    tall, wide, step = street.uniform(1.5, 1.9), street.uniform(0.19, 0.27), street.uniform(0.0, 0.28)
    _shade_figure(street, s, z, tall)
    coat, legs, skin, hair = (street.part(kind) for kind in ("coat", "legs", "skin", "hair"))
    hip, neck = tall * 0.47, tall * 0.83
    hem = hip - street.uniform(0.0, 0.35) if street.chance(0.3) else hip
    for way in (-1, 1):
        street.shape(
            legs,
            (s - 0.12, hip, z),
            (s + 0.12, hip, z),
            (s + 0.07 + way * step, 0.0, z),
            (s - 0.07 + way * step, 0.0, z),
        )
    outline = ((-0.75, hem), (-1.0, neck - 0.14), (-0.5, neck), (0.5, neck), (1.0, neck - 0.14), (0.75, hem))
    street.shape(coat, *((s + wide * share, y, z) for share, y in outline))
    for way in (-1, 1):
        hand = s + way * (wide + street.uniform(0.0, 0.12))
        street.rod(coat, (s + way * (wide - 0.05), neck - 0.1, z), (hand, hip + 0.02, z), 0.1)
    if street.chance(0.3):
        street.box(street.part("coat"), s - wide * 0.7, s + wide * 0.7, hip + 0.15, neck - 0.1, z)  # a bag on the back
    _head(street, skin, hair, s, tall, z)


def _head(street: Street, skin: int, hair: int, s: float, tall: float, z: float) -> None:
    street.oval(skin, s, tall - 0.13, 0.1, 0.13, z)
    if street.chance(0.4):
        street.oval(hair, s, tall - 0.11, 0.11, 0.14, z)  # from behind
    else:
        street.oval(hair, s, tall - 0.05, 0.1, 0.07, z)


# ---- cyclists, bicycles, motorcycles ----


def _cyclists(street: Street, busy: float) -> list[Thing]:
    things: list[Thing] = []
    for _ in range(int(street.rng.integers(0, 2 + int(2.5 * busy)))):
        side, z = street.pick((-1, 1)), 5 + 26 * street.rng.random() * street.rng.random()
        s = side * (street.edge[side] - street.parking[side] * 2.1 - street.uniform(0.3, 0.9))
        motor = street.chance(0.18)
        sideways = street.chance(0.2)
        things.append((z, lambda s=s, z=z, m=motor, w=sideways: _draw_rider(street, s, z, motor=m, sideways=w)))
    for side in (-1, 1):
        if street.chance(0.22):
            z, s = street.uniform(5, 20), side * (street.walk[side] - 0.4)
            for _ in range(int(street.rng.integers(1, 7))):
                things.append((z, lambda s=s, z=z: _draw_bicycle(street, s, z, street.uniform(0.25, 1.0))))
                z += street.uniform(0.5, 1.5)
    return things


def _draw_bicycle(street: Street, s: float, z: float, seen: float) -> None:
    """seen: 1 from the side, 0 from behind."""
    frame, tyre, spokes = street.part("bike"), street.part("bike_tyre"), street.part("spokes")
    reach, r = 0.52 * seen, 0.34
    wide = max(0.04, r * seen)
    for way in (-1, 1):
        street.oval(spokes, s + way * reach, r, wide, r, z, pens=(street.label_pen,))
        street.ring(tyre, s + way * reach, r, wide, r, 0.05, z)
    saddle, bars, pedals = (s - reach * 0.4, 0.92, z), (s + reach * 0.75, 1.0, z), (s - reach * 0.05, 0.32, z)
    for start, end in (
        (saddle, pedals),
        (pedals, (s + reach * 0.7, 0.8, z)),
        ((s + reach * 0.7, 0.8, z), (saddle[0], 0.78, z)),
    ):
        street.rod(frame, start, end, 0.04)
    street.rod(frame, (s - reach, r, z), pedals, 0.035)
    street.rod(frame, (s + reach, r, z), bars, 0.04)
    half = 0.28 * (1 - seen) + 0.06
    street.rod(frame, (bars[0] - half, 1.0, z), (bars[0] + half, 1.0, z), 0.04)
    street.oval(150, s, 0, reach + 0.2, 0.3 * street.eye / z, z, pens=(street.under_pen,))


def _draw_scooter(street: Street, s: float, z: float, seen: float) -> None:
    body, tyre = street.part("scooter"), street.part("scooter_tyre")
    reach = 0.6 * seen
    for way in (-1, 1):
        street.oval(tyre, s + way * reach, 0.3, max(0.07, 0.3 * seen), 0.3, z)
    outline = (
        (-reach - 0.2, 0.35),
        (-reach - 0.18, 0.85),
        (reach * 0.6, 0.8),
        (reach + 0.16, 1.05),
        (reach + 0.2, 0.4),
    )
    street.shape(body, *((s + off, y, z) for off, y in outline))
    street.oval(200, s, 0, reach + 0.3, 0.35 * street.eye / z, z, pens=(street.under_pen,))


def _draw_rider(street: Street, s: float, z: float, *, motor: bool, sideways: bool) -> None:
    seen = street.uniform(0.75, 1.0) if sideways else street.uniform(0.0, 0.3)
    _shade_figure(street, s, z, 1.7)
    (_draw_scooter if motor else _draw_bicycle)(street, s, z, seen)
    coat, legs, skin, helmet = (
        street.part(f"rider_{kind}") if kind != "helmet" else street.part(kind)
        for kind in ("coat", "legs", "skin", "helmet")
    )
    lean, wide = 0.3 * seen, street.uniform(0.2, 0.26)
    hip, neck = s - 0.2 * seen, 1.42
    for way in (-1, 1):
        knee = (hip + 0.28 * seen + way * 0.1, 0.62 + way * 0.08, z)
        street.rod(legs, (hip + way * 0.08 * (1 - seen), 0.95, z), knee, 0.15)
        street.rod(legs, knee, (s + 0.02 * seen + way * 0.09, 0.3 - way * 0.1, z), 0.11)
    outline = (
        (-wide * 0.7, 0.9),
        (lean - wide, neck - 0.1),
        (lean, neck + 0.04),
        (lean + wide, neck - 0.1),
        (wide * 0.7, 0.9),
    )
    street.shape(coat, *((hip + off, y, z) for off, y in outline))
    for way in (-1, 1):
        street.rod(
            coat,
            (hip + lean + way * wide * 0.8 * (1 - seen), neck - 0.08, z),
            (s + 0.4 * seen + way * 0.28 * (1 - seen), 1.04, z),
            0.09,
        )
    street.oval(skin, hip + lean * 1.3, neck + 0.16, 0.1, 0.13, z)
    street.oval(helmet, hip + lean * 1.3, neck + 0.22, 0.12, 0.1, z)
