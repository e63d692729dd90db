"""How scenes look: a rendered style (the source) and a photographed one (the target).

A style gives each kind of part its colours, then light, texture, haze, lens and sensor. The two differ in all of these and share the
meaning of every part, so what separates them is appearance: a net trained on one sees the other badly, and can learn it. The source is
much the same in every image; the target goes from near to far, from clear days to dusk, haze and noise, as photographs do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .scenes import KINDS, Range, Scene

Colour = tuple[int, int, int]
_TILE = 256  # texture tile, pixels a side


@dataclass(frozen=True)
class Style:
    """Colours are RGB 0-255; a part takes one of its kind's colours, each channel off by up to `spread`, and a brightness off by `tone`."""

    colours: dict[str, tuple[Colour, ...]]
    spread: float
    tone: float
    sky_low: tuple[Colour, ...]  # sky colour at the horizon; `colours["sky"]` is the zenith
    light: tuple[
        float, float, float
    ]  # brightness of left fronts, of what faces the camera, of right fronts; swapped at random
    texture: dict[str, float]  # strength by kind; "default" for the rest
    grit: Range  # factor on all of an image's texture strengths
    grain_m: float  # metres of surface per texture pixel
    shade: Range  # how dark the house shadow on the ground is, 0: none
    haze: tuple[Colour, ...]
    haze_m: Range  # distance at which haze makes half of the colour
    exposure: Range
    gains: tuple[Range, ...]  # white balance, range by channel
    saturation: Range
    contrast: Range
    vignette: float
    blur_px: Range
    noise: Range  # standard deviation in levels of 255


SOURCE = Style(
    colours={
        "sky": ((70, 130, 220), (110, 156, 230), (130, 168, 225)),
        "road": ((92, 94, 104), (105, 106, 116), (82, 84, 96)),
        "marking": ((236, 236, 236),),
        "shadow": ((40, 40, 50),),
        "sidewalk": ((172, 168, 172), (186, 180, 176), (160, 160, 170)),
        "verge": ((96, 168, 62), (112, 180, 70)),
        "hedge": ((60, 140, 50), (76, 150, 56)),
        "crown": ((44, 120, 44), (60, 132, 40)),
        "crown_light": ((84, 168, 64), (96, 176, 60)),
        "trunk": ((110, 76, 50),),
        "far_trees": ((70, 130, 70),),
        "far_houses": ((150, 140, 160), (170, 150, 150)),
        "house": ((214, 178, 140), (200, 120, 100), (226, 214, 180), (150, 160, 200), (190, 140, 160)),
        "house_end": ((196, 164, 130), (186, 112, 96), (206, 196, 168), (140, 150, 184)),
        "window": ((60, 84, 130), (90, 120, 160)),
        "fence": ((150, 100, 60), (168, 120, 74), (220, 220, 214)),
        "slat": ((104, 70, 44), (130, 92, 60)),
        "pole": ((70, 72, 80), (90, 90, 96)),
        "car": ((200, 40, 40), (40, 70, 190), (236, 236, 240), (230, 190, 50), (40, 150, 90), (30, 32, 40)),
        "car_side": ((170, 34, 34), (34, 60, 160), (206, 206, 210), (196, 160, 40), (34, 126, 76), (24, 26, 32)),
        "glass": ((40, 56, 84),),
        "tyre": ((24, 24, 28),),
        "lamp": ((240, 60, 50), (255, 244, 210)),
        "coat": ((220, 60, 60), (60, 90, 220), (240, 200, 60), (240, 240, 240), (150, 60, 170)),
        "legs": ((40, 50, 100), (60, 60, 66)),
        "skin": ((232, 184, 150), (150, 100, 74)),
    },
    spread=10,
    tone=0.1,
    sky_low=((190, 214, 240), (214, 226, 238)),
    light=(1.0, 0.88, 0.72),
    texture={
        "default": 0.06,
        "verge": 0.12,
        "crown": 0.16,
        "crown_light": 0.16,
        "hedge": 0.16,
        "far_trees": 0.1,
        "sky": 0.0,
    },
    grit=(1.0, 1.0),
    grain_m=0.12,
    shade=(0.25, 0.25),
    haze=((190, 214, 240),),
    haze_m=(250.0, 500.0),
    exposure=(0.92, 1.06),
    gains=((0.97, 1.03), (0.97, 1.03), (0.97, 1.03)),
    saturation=(0.95, 1.1),
    contrast=(0.97, 1.05),
    vignette=0.0,
    blur_px=(0.0, 0.0),
    noise=(0.0, 1.0),
)

TARGET = Style(
    colours={
        "sky": ((136, 168, 214), (153, 178, 214), (165, 185, 214)),
        "road": ((99, 98, 100), (88, 86, 90), (113, 110, 109)),
        "marking": ((208, 205, 195), (190, 188, 182)),
        "shadow": ((42, 40, 43),),
        "sidewalk": ((154, 149, 147), (162, 155, 151), (146, 142, 142)),
        "verge": ((98, 142, 64), (109, 143, 69), (94, 134, 61)),
        "hedge": ((62, 111, 49), (72, 115, 51)),
        "crown": ((52, 98, 43), (62, 103, 44), (80, 107, 44)),
        "crown_light": ((89, 139, 63), (100, 142, 64), (115, 140, 60)),
        "trunk": ((87, 68, 52),),
        "far_trees": ((90, 118, 83), (100, 122, 83)),
        "far_houses": ((144, 135, 138), (162, 148, 139)),
        "house": ((168, 106, 86), (177, 146, 140), (153, 115, 102), (183, 157, 154), (159, 112, 95), (166, 144, 149)),
        "house_end": ((152, 98, 80), (164, 125, 106), (140, 106, 96), (173, 154, 131)),
        "window": ((59, 70, 89), (79, 91, 111), (126, 142, 158)),
        "fence": ((127, 95, 67), (118, 92, 70), (151, 125, 97)),
        "slat": ((81, 63, 46), (92, 74, 57)),
        "pole": ((91, 90, 90), (107, 106, 104), (70, 74, 74)),
        "car": ((88, 133, 110), (48, 50, 56), (206, 205, 203), (70, 37, 38), (40, 46, 63), (54, 60, 56)),
        "car_side": ((72, 110, 92), (38, 40, 45), (176, 175, 173), (56, 30, 31), (32, 38, 51), (44, 49, 45)),
        "glass": ((47, 56, 68), (74, 85, 97)),
        "tyre": ((30, 29, 29),),
        "lamp": ((186, 60, 49), (228, 218, 186)),
        "coat": ((172, 60, 58), (64, 84, 150), (178, 152, 84), (204, 202, 198), (110, 66, 120), (70, 70, 78)),
        "legs": ((55, 56, 65), (68, 65, 62)),
        "skin": ((210, 164, 133), (139, 95, 73)),
    },
    spread=16,
    tone=0.14,
    sky_low=((214, 216, 214), (226, 220, 206), (206, 212, 220)),
    light=(1.08, 0.9, 0.66),
    texture={
        "default": 0.17,
        "road": 0.23,
        "sidewalk": 0.26,
        "verge": 0.39,
        "crown": 0.55,
        "crown_light": 0.47,
        "hedge": 0.47,
        "far_trees": 0.31,
        "sky": 0.078,
        "house": 0.26,
        "house_end": 0.26,
        "car": 0.062,
        "car_side": 0.062,
        "glass": 0.23,
        "window": 0.31,
    },
    grit=(0.3, 1.4),
    grain_m=0.08,
    shade=(0.0, 0.45),
    haze=((214, 208, 196), (204, 206, 208)),
    haze_m=(40.0, 400.0),
    exposure=(0.45, 1.1),
    gains=((0.95, 1.08), (0.97, 1.03), (0.9, 1.05)),
    saturation=(0.7, 1.0),
    contrast=(0.85, 1.05),
    vignette=0.15,
    blur_px=(0.0, 1.2),
    noise=(3.0, 22.0),
)


def paint(scene: Scene, style: Style, rng: np.random.Generator) -> Image.Image:
    """The scene in this style, as PIL RGB."""
    height, width = scene.part.shape
    colours, strengths, sides = _part_tables(scene, style, rng)
    picture = colours[:, scene.part]  # [3, H, W] float32, 0-255
    _add_sky(picture, scene, style, rng)
    texture = _texture(scene, style, rng)
    picture *= 1 + np.float32(_between(rng, style.grit)) * strengths[scene.part] * texture
    _add_light(picture, scene, style, sides, rng)
    _add_haze(picture, scene.depth, style, rng)
    _develop(picture, style, rng)
    image = Image.fromarray(_to_uint8(picture.transpose(1, 2, 0)))
    blur = _between(rng, style.blur_px)
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    sigma = _between(rng, style.noise)
    # the sum of two uniform bytes is triangular: near enough to a sensor's noise, and exact in integers until the last step
    grains = rng.integers(0, 256, size=(2, height, width, 3), dtype=np.uint8).astype(np.float32)
    noise = (grains[0] + grains[1] - 255) * np.float32(sigma / 104.5)
    return Image.fromarray(_to_uint8(np.asarray(image) + noise))


def _between(rng: np.random.Generator, span: Range) -> float:
    return span[0] + (span[1] - span[0]) * rng.random()


def _pick(rng: np.random.Generator, colours: tuple[Colour, ...]) -> np.ndarray:
    return np.asarray(colours[int(rng.integers(len(colours)))], np.float32)


def _to_uint8(picture: np.ndarray) -> np.ndarray:
    return np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)


def _part_tables(scene: Scene, style: Style, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour [3, 256], texture strength [256] and side [256] of every part. Parts of a group use one draw."""
    colours, strengths, sides = np.zeros((3, 256), np.float32), np.zeros(256, np.float32), np.zeros(256, np.int8)
    draws: dict[int, tuple[float, np.ndarray, float]] = {}
    for part, (kind_index, group, side) in enumerate(zip(scene.kinds, scene.groups, scene.sides, strict=True)):
        kind = KINDS[kind_index]
        if group not in draws:
            draws[group] = (
                rng.random(),
                (rng.random(3) * 2 - 1) * style.spread,
                1 + style.tone * (2 * rng.random() - 1),
            )
        which, off, tone = draws[group]
        choices = style.colours[kind]
        colours[:, part] = (np.asarray(choices[int(which * len(choices))]) + off) * tone
        strengths[part] = style.texture.get(kind, style.texture["default"])
        sides[part] = side
    return colours, strengths, sides


def _add_sky(picture: np.ndarray, scene: Scene, style: Style, rng: np.random.Generator) -> None:
    """A gradient from the zenith's colour to the horizon's."""
    low = _pick(rng, style.sky_low)
    sky = scene.part == 0
    rows = np.arange(scene.part.shape[0], dtype=np.float32) / max(1, int(sky.any(1).sum()))
    blend = np.minimum(rows, 1)[:, None]
    for channel in range(3):
        plane = picture[channel]
        np.copyto(plane, plane * (1 - blend) + low[channel] * blend, where=sky)


@cache
def _tile() -> np.ndarray:
    """Noise in [-1, 1] at four scales, float32 [256, 256]."""
    rng = np.random.Generator(np.random.PCG64(7))
    total = np.zeros((_TILE, _TILE), np.float32)
    for side, weight in ((8, 0.3), (32, 0.3), (96, 0.25), (256, 0.35)):
        small = Image.fromarray(rng.integers(0, 256, size=(side, side), dtype=np.uint8))
        total += weight * (
            np.asarray(small.resize((_TILE, _TILE), Image.Resampling.BILINEAR), dtype=np.float32) / 127.5 - 1
        )
    return np.clip(total * 1.6, -1, 1)


def _texture(scene: Scene, style: Style, rng: np.random.Generator) -> np.ndarray:
    """The tile laid on the surfaces, float32 [H, W]."""
    shift = rng.integers(0, _TILE, size=2)
    per_m = np.float32(1 / style.grain_m)
    column = (np.clip(scene.across, -4000, 4000) * per_m).astype(np.int32) + int(shift[0]) & _TILE - 1
    row = (np.clip(scene.along, -4000, 4000) * per_m).astype(np.int32) + int(shift[1]) & _TILE - 1
    return _tile()[row, column]


def _add_light(picture: np.ndarray, scene: Scene, style: Style, sides: np.ndarray, rng: np.random.Generator) -> None:
    """Brighter fronts on the sunny side of the street, and the shadow of the other side's houses on the ground."""
    left, ahead, right = style.light
    sun = 1 if rng.random() < 0.5 else -1  # 1: from the right, so that left fronts are lit
    of_side = np.array([left, ahead, right][::sun], np.float32)  # by side -1, 0, 1
    flat = np.array(
        [
            i
            for i, kind in enumerate(scene.kinds)
            if KINDS[kind] in ("road", "marking", "sidewalk", "verge", "shadow", "sky")
        ]
    )
    table = of_side[sides + 1]
    table[flat] = 1
    light = table[scene.part]
    shade = _between(rng, style.shade)
    if shade:
        reach = _between(rng, (-1.0, 3.5))
        on_ground = np.zeros(256, bool)
        on_ground[flat[1:]] = True
        light = np.where(on_ground[scene.part] & (scene.across * sun > reach), light * np.float32(1 - shade), light)
    picture *= light


def _add_haze(picture: np.ndarray, depth: np.ndarray, style: Style, rng: np.random.Generator) -> None:
    colour, half = _pick(rng, style.haze), np.float32(_between(rng, style.haze_m))
    share = np.where(depth < 900, depth / (depth + half), np.float32(0.15))  # the sky has its own colour already
    for channel in range(3):
        picture[channel] += (colour[channel] - picture[channel]) * share


def _develop(picture: np.ndarray, style: Style, rng: np.random.Generator) -> None:
    """Exposure, white balance, saturation, contrast and vignette, in place."""
    exposure, saturation, contrast = (
        _between(rng, span) for span in (style.exposure, style.saturation, style.contrast)
    )
    grey = picture[0] * np.float32(0.3) + picture[1] * np.float32(0.6) + picture[2] * np.float32(0.1)
    for channel in range(3):
        gain = np.float32(exposure * _between(rng, style.gains[channel]) * contrast)
        plane = picture[channel]
        plane += (grey - plane) * np.float32(1 - saturation)
        plane *= gain
        plane += np.float32(118 * (1 - contrast))
    if style.vignette:
        height, width = picture.shape[1:]
        x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / width * 2 - 1
        y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) / height * 2 - 1
        picture *= 1 - np.float32(style.vignette / 2) * (x[None, :] * x[None, :] + y[:, None] * y[:, None])
