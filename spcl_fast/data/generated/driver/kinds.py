"""What things are made of: the class of every kind of surface, its colours in plain daylight, and how rough it is.

The classes are Cityscapes' 19; all but trains occur.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...classes import CITYSCAPES_19

Colour = tuple[int, int, int]  # RGB, 0-255


@dataclass(frozen=True)
class Kind:
    """One kind of surface. A group of parts takes one of the colours; `grain` and `patch`: how strongly fine and coarse texture shows."""

    colours: tuple[Colour, ...]
    grain: float = 0.10
    patch: float = 0.10


_BRICK: tuple[Colour, ...] = ((148, 98, 80), (128, 84, 70), (170, 146, 112), (186, 164, 126), (120, 96, 84))
_STONE: tuple[Colour, ...] = (
    (204, 196, 180),
    (176, 168, 154),
    (150, 142, 132),
    (224, 220, 212),
    (190, 180, 160),
    (130, 124, 118),
)
_PAINT: tuple[Colour, ...] = (
    (196, 198, 200), (226, 226, 226), (128, 132, 136), (44, 46, 50), (62, 66, 72), (34, 44, 82), (52, 82, 136), (132, 32, 36),
    (172, 40, 38), (36, 66, 52), (96, 100, 104), (160, 150, 128), (84, 40, 48), (26, 28, 32), (204, 178, 74),
)  # fmt: skip
_CLOTH: tuple[Colour, ...] = (
    (34, 36, 42), (54, 56, 64), (40, 48, 76), (84, 76, 66), (120, 48, 48), (150, 148, 144), (58, 72, 62), (206, 202, 196), (176, 96, 60),
    (70, 96, 140), (28, 28, 30), (190, 180, 60),
)  # fmt: skip
_TROUSERS: tuple[Colour, ...] = ((38, 40, 50), (52, 58, 76), (30, 30, 32), (96, 86, 70), (74, 74, 78))
_SKIN: tuple[Colour, ...] = ((222, 178, 150), (196, 148, 118), (138, 96, 72), (96, 66, 52))
# The road's greys are among them: where sidewalks were the lighter grey, nets called the pavements of photographs road.
_PAVING: tuple[Colour, ...] = (
    (142, 138, 134), (158, 152, 146), (126, 122, 120), (150, 136, 124), (134, 120, 112), (112, 108, 108),
    (100, 98, 98), (90, 88, 90), (108, 102, 98), (118, 116, 114), (96, 92, 88), (104, 104, 106),
)  # fmt: skip
_METAL: tuple[Colour, ...] = (
    (98, 100, 100),
    (126, 128, 128),
    (62, 66, 66),
    (48, 56, 50),
    (156, 156, 152),
    (84, 80, 74),
)
_HEDGE: tuple[Colour, ...] = ((62, 88, 46), (74, 98, 50), (50, 74, 44), (88, 96, 58))

_BY_CLASS: dict[str, dict[str, Kind]] = {
    "road": {
        "road": Kind(((100, 100, 102), (86, 86, 90), (114, 112, 110), (126, 122, 118), (94, 90, 88), (104, 106, 110)), 0.10, 0.08),
        "repair": Kind(((78, 78, 80), (92, 90, 88), (118, 116, 114)), 0.10, 0.06),
        "marking": Kind(((206, 204, 200), (226, 222, 216), (176, 174, 168)), 0.16, 0.14),
        "yellow_line": Kind(((196, 168, 76), (174, 150, 70), (206, 186, 110)), 0.14, 0.12),
        "cover": Kind(((60, 58, 56), (84, 80, 76)), 0.15),
    },
    "sidewalk": {
        "sidewalk": Kind(_PAVING, 0.10, 0.10),
        "joint": Kind(tuple((r - 26, g - 26, b - 26) for r, g, b in _PAVING), 0.10, 0.10),
        "kerb": Kind(((156, 154, 150), (176, 172, 168), (120, 118, 116)), 0.12, 0.12),
    },
    "building": {
        "house": Kind((*_BRICK, *_STONE, *_BRICK, (206, 176, 146), (96, 92, 92), (232, 230, 224)), 0.18, 0.09),
        "trim": Kind(((226, 222, 214), (196, 190, 178), (120, 112, 104), (150, 144, 136)), 0.06, 0.06),
        "roof": Kind(((88, 70, 64), (112, 80, 66), (78, 78, 84), (98, 94, 92), (128, 84, 68)), 0.12, 0.10),
        "pane": Kind(((52, 58, 68), (36, 40, 48), (78, 88, 100), (118, 130, 142), (64, 66, 68), (150, 160, 170)), 0.25, 0.6),
        "frame": Kind(((232, 230, 226), (206, 204, 200), (70, 62, 56), (110, 104, 98)), 0.04, 0.04),
        "shop_pane": Kind(((76, 78, 82), (48, 50, 54), (116, 118, 120), (94, 82, 70), (150, 140, 120)), 0.5, 0.7),
        "fascia": Kind(
            ((120, 30, 34), (30, 50, 96), (34, 64, 48), (222, 218, 210), (44, 42, 44), (196, 150, 60), (150, 60, 100)), 0.35, 0.1
        ),
        "door": Kind(((70, 40, 34), (36, 50, 74), (40, 60, 46), (46, 44, 46), (196, 194, 190)), 0.06, 0.08),
        "skyline": Kind(((132, 126, 126), (150, 142, 134), (116, 108, 106), (168, 160, 150)), 0.4, 0.3),
    },
    "wall": {"wall": Kind((*_BRICK, *_STONE[:3]), 0.14, 0.14), "coping": Kind(_STONE, 0.10, 0.10)},
    "fence": {
        "fence": Kind(((120, 96, 72), (98, 80, 62), (150, 130, 102), (72, 78, 68), (204, 200, 192), (136, 118, 104)), 0.14, 0.12),
        "rail": Kind(((62, 64, 66), (42, 52, 46), (142, 144, 146), (36, 36, 38), (168, 168, 166)), 0.05, 0.08),
        "railing": Kind(((90, 90, 90),), 0.05, 0.05),  # what one sees through between rails
    },
    "pole": {"pole": Kind(_METAL, 0.06, 0.08), "lantern": Kind(((170, 170, 168), (206, 206, 200), (90, 92, 92)), 0.05, 0.05)},
    "traffic light": {
        "signal": Kind(((28, 30, 30), (38, 42, 38), (50, 52, 50), (28, 30, 30), (184, 146, 40)), 0.05, 0.05),
        "signal_rim": Kind(((220, 218, 212), (20, 20, 22)), 0.03, 0.03),
        "lens": Kind(((56, 30, 28), (58, 48, 26), (26, 48, 36)), 0.05, 0.05),
        "red_light": Kind(((255, 64, 48),), 0, 0), "amber_light": Kind(((255, 178, 56),), 0, 0),
        "green_light": Kind(((70, 250, 170),), 0, 0),
    },
    "traffic sign": {
        "sign": Kind(
            ((232, 232, 228), (214, 212, 206), (32, 80, 168), (20, 64, 140), (228, 190, 50), (200, 36, 40), (30, 110, 74)), 0.04, 0.05
        ),
        "sign_rim": Kind(((196, 34, 38), (210, 44, 44)), 0.04, 0.05),
        "sign_mark": Kind(((34, 34, 36), (240, 240, 238)), 0.04, 0.05),
        "sign_back": Kind(((128, 130, 130), (96, 98, 98)), 0.04, 0.05),
    },
    "vegetation": {
        "hedge": Kind(_HEDGE, 0.42, 0.30),
        "crown_dark": Kind(((42, 58, 34), (54, 66, 40), (38, 52, 34)), 0.55, 0.3),
        "crown": Kind(((58, 84, 44), (70, 94, 48), (84, 104, 54), (52, 74, 46), (104, 104, 58), (70, 76, 50)), 0.6, 0.30),
        "crown_light": Kind(((90, 116, 62), (104, 128, 68), (116, 128, 80), (84, 104, 60)), 0.6, 0.3),
        "twigs": Kind(((76, 66, 58), (62, 56, 50), (92, 78, 64), (54, 48, 44)), 0.20, 0.15),
        "trunk": Kind(((84, 72, 60), (66, 58, 50), (104, 92, 78), (92, 94, 82)), 0.25, 0.15),
        "far_trees": Kind(((84, 94, 74), (96, 100, 82), (72, 84, 66), (100, 92, 82), (82, 76, 70)), 0.30, 0.30),
        "airy_crown": Kind(((90, 90, 80),), 0.1, 0.1),  # what one sees through between twigs
    },
    "terrain": {
        "verge": Kind(((98, 124, 62), (112, 134, 68), (88, 110, 58), (122, 124, 78), (116, 100, 80), (90, 118, 56)), 0.28, 0.22),
    },
    "sky": {"sky": Kind(((255, 255, 255),), 0, 0)},  # the painter has its colours
    "person": {
        "coat": Kind(_CLOTH, 0.12, 0.15), "legs": Kind(_TROUSERS, 0.1, 0.1), "skin": Kind(_SKIN, 0.03, 0.05),
        "hair": Kind(((40, 34, 30), (74, 58, 44), (26, 24, 24), (150, 130, 100), (120, 118, 116)), 0.1, 0.1),
    },
    "rider": {
        "rider_coat": Kind((*_CLOTH, (214, 226, 60), (234, 120, 40)), 0.12, 0.15), "rider_legs": Kind(_TROUSERS, 0.1, 0.1),
        "rider_skin": Kind(_SKIN, 0.03, 0.05),
        "helmet": Kind(((220, 220, 218), (40, 40, 44), (170, 40, 40), (60, 50, 42)), 0.05, 0.05),
    },
    "motorcycle": {"scooter": Kind((*_PAINT[3:9], (40, 40, 42)), 0.1, 0.1), "scooter_tyre": Kind(((24, 24, 26),), 0.1, 0.1)},
    "bicycle": {
        "bike": Kind(((36, 36, 40), (120, 30, 34), (40, 60, 110), (150, 150, 148), (30, 70, 50), (24, 24, 26)), 0.05, 0.05),
        "bike_tyre": Kind(((30, 30, 32), (52, 50, 48)), 0.05, 0.05),
        "spokes": Kind(((90, 90, 90),), 0.05, 0.05),  # what one sees through between spokes
    },
}  # fmt: skip


def _vehicle(name: str, paint: tuple[Colour, ...]) -> dict[str, Kind]:
    """The surfaces of one class of vehicles."""
    return {
        f"{name}_body": Kind(paint, 0.03, 0.07),
        f"{name}_glass": Kind(((40, 46, 54), (28, 32, 38), (70, 80, 90), (104, 116, 126)), 0.05, 0.35),
        f"{name}_trim": Kind(((38, 38, 40), (58, 58, 60), (90, 92, 94)), 0.06, 0.08),
        f"{name}_tyre": Kind(((24, 24, 26), (34, 33, 33)), 0.08, 0.08),
        f"{name}_hub": Kind(((140, 142, 146), (100, 102, 104), (60, 60, 62)), 0.2, 0.1),
        f"{name}_lamp": Kind(((226, 228, 230), (255, 250, 226), (180, 184, 190)), 0.03, 0.05),
        f"{name}_tail": Kind(((150, 30, 28), (186, 40, 34), (255, 60, 44)), 0.03, 0.05),
        f"{name}_plate": Kind(((222, 220, 210), (216, 186, 70)), 0.2, 0.05),
        f"{name}_void": Kind(((18, 18, 20),), 0.02, 0.02),  # wheel arches and what is dark beneath
    }


_BY_CLASS["car"] = _vehicle("car", _PAINT)
_BY_CLASS["truck"] = _vehicle(
    "truck", ((222, 222, 220), (236, 236, 234), (170, 40, 40), (40, 70, 130), (110, 114, 118), (196, 170, 60))
)
_BY_CLASS["bus"] = _vehicle(
    "bus", ((176, 34, 38), (190, 40, 36), (220, 218, 210), (44, 80, 150), (60, 120, 90), (206, 176, 60))
)

KINDS: dict[str, Kind] = {name: kind for kinds in _BY_CLASS.values() for name, kind in kinds.items()}
LABELS: dict[str, int] = {
    name: CITYSCAPES_19.names.index(label) for label, kinds in _BY_CLASS.items() for name in kinds
}
SEEN_THROUGH = ("airy_crown", "railing", "spokes")  # in the labels only: the picture shows what is behind them
