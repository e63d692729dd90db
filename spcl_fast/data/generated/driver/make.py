"""The order in which a street is drawn."""

from __future__ import annotations

import numpy as np

from .ground import draw_ground, draw_sky_and_skyline, flat_marks
from .lots import draw_back_row, draw_front_row, plan_row
from .street import Scene, Street
from .things import place_poles, place_street_trees, place_trees
from .traffic import place_traffic


def make_scene(size: tuple[int, int], rng: np.random.Generator) -> Scene:
    """One street. size: (width, height) in pixels."""
    street = Street(size, rng)
    planned = {side: plan_row(street, side) for side in (-1, 1)}
    rows = {side: row for side, (row, _) in planned.items()}
    draw_sky_and_skyline(street)
    draw_ground(street, rows)
    for side, (row, quarter) in planned.items():
        draw_back_row(street, side, row, quarter)
    street.draw([*flat_marks(street), *place_trees(street, {side: quarter for side, (_, quarter) in planned.items()})])
    for side, row in rows.items():
        draw_front_row(street, side, row)
    street.draw([*place_street_trees(street), *place_poles(street), *place_traffic(street, rows)])
    return street.scene
