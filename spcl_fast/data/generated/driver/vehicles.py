"""Cars, vans, trucks and buses: an outline drawn out to the vehicle's width, from any side."""

from __future__ import annotations

from dataclasses import dataclass

from .street import AHEAD, FLAT, LEFT, RIGHT, Point, Street

_SILL = 0.22  # metres from the ground to a car's body


@dataclass(frozen=True)
class Model:
    """A type of vehicle. `top`: its outline from tail to nose as (share of the length, share of the height, surface from there on)."""

    kind: str  # car | truck | bus
    length: tuple[float, float]
    width: tuple[float, float]
    height: tuple[float, float]
    top: tuple[tuple[float, float, str], ...]
    panes: tuple[tuple[tuple[float, float], ...], ...]  # side windows, as shares of length and height
    wheels: tuple[float, float]  # shares of the length
    belt: float  # share of the height at which the windows begin; above it the cabin narrows
    narrows: float = 0.2


def _row(start: float, end: float, count: int, low: float, high: float) -> tuple:
    """`count` side windows in a row."""
    step = (end - start) / count
    left = [start + step * k for k in range(count)]
    return tuple(((x, low), (x, high), (x + step * 0.88, high), (x + step * 0.88, low)) for x in left)


MODELS: dict[str, Model] = {
    "hatchback": Model(
        "car", (3.6, 4.2), (1.65, 1.8), (1.38, 1.55),
        (
            (0, 0.58, "body"), (0.02, 0.67, "glass"), (0.15, 0.97, "body"), (0.54, 1.0, "glass"), (0.75, 0.66, "body"),
            (0.97, 0.52, "body"), (1, 0.4, "body"),
        ),
        (((0.13, 0.68), (0.21, 0.92), (0.40, 0.94), (0.40, 0.68)),
         ((0.43, 0.68), (0.43, 0.94), (0.55, 0.93), (0.71, 0.67))), (0.17, 0.82), 0.66,
    ),
    "saloon": Model(
        "car", (4.2, 4.9), (1.7, 1.85), (1.36, 1.48),
        (
            (0, 0.56, "body"), (0.02, 0.67, "body"), (0.16, 0.69, "glass"), (0.31, 0.97, "body"), (0.56, 1.0, "glass"),
            (0.74, 0.67, "body"),
            (0.98, 0.52, "body"), (1, 0.4, "body"),
        ),
        (((0.24, 0.69), (0.34, 0.92), (0.45, 0.94), (0.45, 0.69)),
         ((0.48, 0.69), (0.48, 0.94), (0.57, 0.93), (0.70, 0.68))), (0.19, 0.83), 0.67,
    ),
    "estate": Model(
        "car", (4.3, 4.9), (1.72, 1.95), (1.45, 1.8),
        (
            (0, 0.58, "body"), (0.01, 0.66, "glass"), (0.07, 0.97, "body"), (0.58, 1.0, "glass"), (0.75, 0.64, "body"),
            (0.98, 0.53, "body"), (1, 0.4, "body"),
        ),
        (
            ((0.07, 0.66), (0.11, 0.92), (0.25, 0.93), (0.25, 0.66)), ((0.28, 0.66), (0.28, 0.93), (0.44, 0.94), (0.44, 0.66)),
            ((0.47, 0.66), (0.47, 0.94), (0.58, 0.93), (0.71, 0.65)),
        ), (0.18, 0.82), 0.64,
    ),
    "van": Model(
        "car", (4.4, 5.8), (1.85, 2.0), (1.85, 2.5),
        ((0, 0.96, "body"), (0.01, 1.0, "body"), (0.70, 1.0, "glass"), (0.84, 0.60, "body"), (0.98, 0.50, "body"), (1, 0.36, "body")),
        (((0.62, 0.58), (0.62, 0.90), (0.71, 0.90), (0.82, 0.58)),), (0.18, 0.82), 0.58, 0.1,
    ),
    "truck": Model(
        "truck", (6.0, 9.5), (2.2, 2.5), (2.9, 3.8),
        (
            (0, 0.98, "body"), (0.005, 1.0, "body"), (0.75, 1.0, "body"), (0.76, 0.74, "body"), (0.95, 0.72, "glass"),
            (0.99, 0.44, "body"), (1, 0.3, "body"),
        ),
        (((0.84, 0.46), (0.84, 0.68), (0.94, 0.68), (0.97, 0.46)),), (0.2, 0.86), 0.9, 0.02,
    ),
    "bus": Model(
        "bus", (9.0, 12.0), (2.4, 2.55), (2.8, 3.2),
        (
            (0, 0.5, "body"), (0.002, 0.6, "glass"), (0.006, 0.92, "body"), (0.01, 1.0, "body"), (0.985, 1.0, "body"),
            (0.99, 0.9, "glass"), (1, 0.36, "body"),
        ),
        _row(0.04, 0.95, 6, 0.42, 0.84), (0.25, 0.76), 0.9, 0.02,
    ),
    "double_decker": Model(
        "bus", (9.0, 11.0), (2.45, 2.55), (4.1, 4.4),
        (
            (0, 0.28, "body"), (0.002, 0.62, "glass"), (0.004, 0.82, "body"), (0.01, 1.0, "body"), (0.98, 1.0, "body"),
            (0.985, 0.90, "glass"),
            (0.99, 0.62, "body"), (0.995, 0.50, "glass"), (1, 0.24, "body"),
        ),
        (*_row(0.04, 0.95, 6, 0.26, 0.46), *_row(0.04, 0.95, 6, 0.62, 0.84)), (0.25, 0.76), 0.9, 0.02,
    ),
}  # fmt: skip
_PARKED = {"hatchback": 0.42, "saloon": 0.26, "estate": 0.24, "van": 0.08}
_MOVING = {
    "hatchback": 0.32,
    "saloon": 0.24,
    "estate": 0.18,
    "van": 0.09,
    "truck": 0.07,
    "bus": 0.05,
    "double_decker": 0.05,
}


def pick_model(street: Street, *, parked: bool) -> Model:
    return MODELS[street.weighted(_PARKED if parked else _MOVING)]


class Vehicle:
    """One vehicle: its tail in the middle at (s, z), its nose towards `heading` = (across, along), of length 1."""

    def __init__(self, street: Street, model: Model, s: float, z: float, heading: tuple[float, float]):
        self.street, self.model, self.s, self.z, self.heading = street, model, s, z, heading
        self.length, self.width, self.height = (
            street.uniform(*span) for span in (model.length, model.width, model.height)
        )
        self.sill = _SILL if model.kind == "car" else 0.35

    @classmethod
    def nearest_at(cls, street: Street, model: Model, s: float, z: float, heading: tuple[float, float]) -> Vehicle:
        """With its nearer end at z instead of its tail."""
        vehicle = cls(street, model, s, z, heading)
        vehicle.z -= min(heading[1], 0) * vehicle.length
        vehicle.s -= min(heading[1], 0) * heading[0] * vehicle.length
        return vehicle

    def place(self, along: float, across: float, y: float) -> Point:
        """Metres from the tail, from the middle and from the ground -> s, y, z."""
        hs, hz = self.heading
        return self.s + along * hs + across * hz, y, self.z + along * hz - across * hs

    def half(self, y: float) -> float:
        """Half of the width at this height: the cabin narrows above the belt."""
        belt = self.model.belt * self.height
        return self.width / 2 * (1 - self.model.narrows * max(0.0, (y - belt) / (self.height - belt)))

    def draw(self) -> None:
        street, kind = self.street, self.model.kind
        self._darken()
        paint = street.group()
        hs, hz = self.heading
        middle, tail = self.place(self.length / 2, 0, 0), self.place(0, 0, 0)
        tail_shows = tail[0] * hs + tail[2] * hz > 0
        camera = middle[2] * hs - middle[0] * hz  # how far to the vehicle's right the camera is
        flank = 1 if camera > 0 else -1
        side = LEFT if hz * flank > 0.3 else RIGHT if hz * flank < -0.3 else AHEAD
        self.body = {facing: street.part(f"{kind}_body", group=paint, facing=facing) for facing in (AHEAD, FLAT)}
        self.side_body = street.part(f"{kind}_body", group=paint, facing=side)
        self.glass, self.trim, self.tyre, self.void = (
            street.part(f"{kind}_{what}") for what in ("glass", "trim", "tyre", "void")
        )
        self._draw_wheels(-flank, rims=False)
        self._draw_top(tail_shows)
        self._draw_end(tail_shows)
        if abs(camera) > self.width / 2:
            self._draw_flank(flank)
            self._draw_wheels(flank, rims=True)

    def _darken(self) -> None:
        """Less sky beneath, and the shadow that the sun makes."""
        street, half = self.street, self.width / 2
        ends = [
            (-0.15, -half - 0.1),
            (-0.15, half + 0.1),
            (self.length + 0.15, half + 0.1),
            (self.length + 0.15, -half - 0.1),
        ]
        corners = [self.place(along, across, 0) for along, across in ends]
        street.under_pen.polygon([street.px(*corner) for corner in corners], fill=220)
        side, reach, skew = street.sun
        for y in (0.3, 0.6, 1.0):
            shift = -side * reach * y * self.height * 0.9, skew * y * self.height * 0.9
            street.shadow(*[(s + shift[0], 0, max(z + shift[1], 1.0)) for s, _, z in corners])

    def _draw_top(self, tail_shows: bool) -> None:
        """The surfaces along the outline, far ones first."""
        street, top = self.street, self.model.top
        faces = list(zip(top, top[1:], strict=False))
        for (l0, y0, kind), (l1, y1, _) in reversed(faces) if tail_shows else faces:
            lower, upper = self.half(y0 * self.height), self.half(y1 * self.height)
            a, b = (l0 * self.length, y0 * self.height), (l1 * self.length, y1 * self.height)
            steep = abs(b[1] - a[1]) > 0.4 * (b[0] - a[0])
            street.shape(
                self.body[AHEAD if steep else FLAT],
                *(
                    self.place(*corner)
                    for corner in ((a[0], -lower, a[1]), (a[0], lower, a[1]), (b[0], upper, b[1]), (b[0], -upper, b[1]))
                ),
            )
            if kind == "glass":
                self._pane(a, b, lower, upper)

    def _pane(self, a: tuple[float, float], b: tuple[float, float], lower: float, upper: float) -> None:
        def at(share: float, across: float) -> Point:
            return self.place(a[0] + share * (b[0] - a[0]), across, a[1] + share * (b[1] - a[1]))

        self.street.shape(
            self.glass, at(0.06, -lower * 0.88), at(0.06, lower * 0.88), at(0.9, upper * 0.86), at(0.9, -upper * 0.86)
        )

    def _draw_end(self, tail: bool) -> None:
        """The upright end with bumper, lamps and plate."""
        street, kind = self.street, self.model.kind
        at = 0.0 if tail else self.length
        tall = (self.model.top[0] if tail else self.model.top[-1])[1] * self.height
        half, sill = self.width / 2, self.sill

        def face(part: int, left: float, right: float, low: float, high: float) -> None:
            street.shape(
                part,
                *(self.place(at, across, y) for across, y in ((left, low), (left, high), (right, high), (right, low))),
            )

        for wheel in (-1, 1):
            face(self.tyre, wheel * (half - 0.3), wheel * (half - 0.06), 0, sill + 0.15)
        face(self.body[AHEAD], -half, half, sill, tall)
        face(self.trim, -half, half, sill, sill + 0.14)
        lamp = street.part(f"{kind}_{'tail' if tail else 'lamp'}")
        # lamps sit at the shoulder: for a nose they reach up into the bonnet's edge
        high = 0.6 * self.height if kind == "car" and tail and tall < 1.2 else min(tall, 1.1)
        low = high - (0.26 if tail else 0.2)
        for wheel in (-1, 1):
            face(lamp, wheel * (half - 0.04), wheel * (half - (0.2 if tail else 0.42)), low, high)
        if not tail:
            face(self.void, -half * 0.5, half * 0.5, low - 0.02, high - 0.04)
        face(street.part(f"{kind}_plate"), -0.26, 0.26, sill + 0.16, sill + 0.28)

    def _draw_flank(self, flank: int) -> None:
        street = self.street

        def at(share: float, height: float) -> Point:
            return self.place(share * self.length, flank * self.half(height * self.height), height * self.height)

        low = self.sill / self.height
        street.shape(self.side_body, at(0, low), *(at(share, y) for share, y, _ in self.model.top), at(1, low))
        for pane in self.model.panes:
            street.shape(self.glass, *(at(*corner) for corner in pane))
        street.shape(self.trim, at(0.02, low), at(0.02, low + 0.05), at(0.98, low + 0.05), at(0.98, low))

    def _draw_wheels(self, flank: int, *, rims: bool) -> None:
        street, across = self.street, flank * (self.width / 2 + 0.01)
        radius = 0.31 if self.model.kind == "car" else 0.48
        hub = street.part(f"{self.model.kind}_hub") if rims else self.tyre
        for share in self.model.wheels:
            for part, r in ((self.void, radius * 1.14), (self.tyre, radius), (hub, radius * 0.6)):
                (x0, _), (x1, _) = (street.px(*self.place(share * self.length + d, across, 0)) for d in (-r, r))
                _, bottom = street.px(
                    *self.place(share * self.length, across, radius - r if part != self.void else 0.03)
                )
                _, top = street.px(*self.place(share * self.length, across, radius + r))
                if abs(x1 - x0) >= 1:
                    for pen in street.both:
                        pen.ellipse((min(x0, x1), top, max(x0, x1), max(bottom, top)), fill=part)
