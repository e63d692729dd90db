"""How a street looks: colours, texture, sun and sky, haze, and the camera. All of it varies from image to image around what photographs
show.

float32 arrays, and + - * /, comparisons and table look-ups alone, like the scenes themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .kinds import KINDS
from .street import FLAT, LEFT, RIGHT, Scene

_TILE = 512  # texture tiles, texels a side
_TEXEL_M = 0.01  # metres of a texel of fine texture in the nearest zone; doubled with every doubling of the distance
_PATCH_M = 0.12  # metres of a texel of coarse texture
_SKY_DEPTH = 900.0  # metres: beyond is sky
_GLOWING = ("red_light", "amber_light", "green_light")

Range = tuple[float, float]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Sky:
    """Colours at the zenith, at the horizon and of clouds, RGB 0-255; how much clouds cover, and by how much it outshines the street."""

    zenith: Triple
    horizon: Triple
    cloud: Triple
    cover: Range
    gain: Range
    light: Range  # exposure of the street beneath it


_CLEAR: dict[str, tuple[float, Sky]] = {  # name: (share, sky)
    "blue": (0.40, Sky((112, 156, 206), (204, 220, 234), (246, 246, 246), (0.0, 0.45), (1.0, 1.4), (0.75, 1.25))),
    "bright": (0.45, Sky((224, 234, 242), (246, 248, 250), (255, 255, 255), (0.0, 0.7), (1.1, 1.9), (0.6, 1.25))),
    "low_sun": (0.15, Sky((150, 168, 196), (248, 232, 210), (236, 214, 196), (0.0, 0.6), (1.0, 1.7), (0.5, 1.0))),
}
_OVERCAST: dict[str, tuple[float, Sky]] = {
    "white": (0.55, Sky((236, 240, 244), (248, 248, 248), (214, 218, 222), (0.0, 0.8), (1.1, 1.9), (0.65, 1.25))),
    "grey": (0.25, Sky((176, 184, 194), (216, 220, 222), (136, 144, 154), (0.3, 0.9), (1.0, 1.4), (0.5, 1.0))),
    "dusk": (0.20, Sky((128, 144, 156), (188, 200, 202), (86, 98, 106), (0.3, 0.9), (0.9, 1.3), (0.16, 0.45))),
}


def paint(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as a photograph of its own hour, weather and camera, PIL RGB."""
    sky = _pick_sky(scene, rng)
    exposure = _between(rng, sky.light)
    sunlight = 0.0 if scene.overcast else _between(rng, (0.35, 1.1))
    picture = _colours(scene, rng, sunlight, exposure)[:, scene.seen]  # [3, H, W] float32, 0-255
    picture *= _texture(scene, rng)
    picture *= _ground_light(scene, rng, sunlight)
    _haze(picture, scene, sky, rng, exposure)
    _paint_sky(picture, scene, sky, rng)
    return _photograph(picture, rng)


def _between(rng: np.random.Generator, span: Range) -> float:
    return span[0] + (span[1] - span[0]) * rng.random()


def _often_little(rng: np.random.Generator, most: float) -> float:
    """0 .. most, small values more often."""
    share = rng.random()
    return most * share * share


def _pick_sky(scene: Scene, rng: np.random.Generator) -> Sky:
    skies = list((_OVERCAST if scene.overcast else _CLEAR).values())
    at = np.searchsorted(np.cumsum([share for share, _ in skies]), rng.random(), side="right")
    return skies[min(int(at), len(skies) - 1)][1]


# ---- surfaces ----


def _light_of_facing(scene: Scene, rng: np.random.Generator, sunlight: float) -> list[float]:
    """Brightness of surfaces that lie flat, face the camera, or the street from the left or right side."""
    sky = [1.0, _between(rng, (0.5, 0.9)), 0.0, 0.0]
    sky[LEFT] = sky[RIGHT] = _between(rng, (0.5, 0.9))
    ahead = _between(rng, (-0.6, 1.0))  # the sun behind the camera, or before it
    lit = [0.8, max(ahead, 0.0), 0.0, 0.0]
    lit[LEFT if scene.sun > 0 else RIGHT] = _between(rng, (0.5, 1.1))
    ambient = 1 - 0.5 * min(sunlight, 1.0)
    return [ambient * s + 0.75 * sunlight * direct for s, direct in zip(sky, lit, strict=True)]


def _colours(scene: Scene, rng: np.random.Generator, sunlight: float, exposure: float) -> np.ndarray:
    """Colour of every part in its light, float32 [3, parts]. Parts of a group take one draw."""
    lights = _light_of_facing(scene, rng, sunlight)
    spread, tone = _between(rng, (3, 14)), _between(rng, (0.08, 0.32))
    groups = max(part.group for part in scene.parts) + 1
    draws = rng.random((groups, 5)).tolist()
    colours = np.empty((len(scene.parts), 3), np.float32)
    for index, part in enumerate(scene.parts):
        which, *off, bright = draws[part.group]
        choices = KINDS[part.kind].colours
        base = choices[int(which * len(choices))]
        if part.kind in _GLOWING:
            colours[index] = base
            continue
        light = exposure * lights[part.facing] * (1 + tone * (2 * bright - 1))
        colours[index] = [(c + spread * (2 * o - 1)) * light for c, o in zip(base, off, strict=True)]
    return np.ascontiguousarray(np.maximum(colours, 0).T)


@cache
def _tile(scales: tuple[int, ...], seed: int) -> np.ndarray:
    """Noise in [-1, 1] that is the sum of these many cells a side, float32 [_TILE, _TILE]."""
    rng = np.random.Generator(np.random.PCG64(seed))
    total = np.zeros((_TILE, _TILE), np.float32)
    for side in scales:
        cells = Image.fromarray(rng.integers(0, 256, size=(side, side), dtype=np.uint8))
        total += (
            np.asarray(cells.resize((_TILE, _TILE), Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(127.5) - 1
        )
    return np.clip(total * np.float32(1.8 / len(scales)), -1, 1)


def _fine() -> np.ndarray:
    return _tile((48, 160, 512), 7)


def _coarse() -> np.ndarray:
    return _tile((12, 32, 96), 8)


def _lay(tile: np.ndarray, across: np.ndarray, along: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The tile on surfaces, by coordinates in texels."""
    column = across.astype(np.int32) + int(shift[0]) & _TILE - 1
    row = along.astype(np.int32) + int(shift[1]) & _TILE - 1
    return tile[row, column]


def _texture(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Factor on the colours, float32 [H, W]: fine texture of one size in the picture, coarse patches of one size on the surface."""
    grit, blotch = np.float32(_between(rng, (0.5, 1.5))), np.float32(_between(rng, (0.5, 1.5)))
    kinds = [KINDS[part.kind] for part in scene.parts]
    facing = np.array([part.facing for part in scene.parts], np.int8)[scene.seen]
    grain = np.array([kind.grain for kind in kinds], np.float32)[scene.seen]
    patch = np.array([kind.patch for kind in kinds], np.float32)[scene.seen]
    depth = np.minimum(scene.depth, 500)
    across = np.where(facing >= LEFT, depth, depth * scene.u)
    along = np.where(facing == FLAT, depth, depth * scene.v[:, None])
    zone = np.frexp(depth * np.float32(1 / 4))[1]
    per_m = np.ldexp(np.float32(1 / _TEXEL_M), -zone).astype(np.float32)
    shift = rng.integers(0, _TILE, size=(2, 2))
    fine = _lay(_fine(), across * per_m, along * per_m, shift[0])
    coarse = _lay(_coarse(), across * np.float32(1 / _PATCH_M), along * np.float32(1 / _PATCH_M), shift[1])
    return np.maximum(1 + grit * grain * fine + blotch * patch * coarse, np.float32(0.15))


def _ground_light(scene: Scene, rng: np.random.Generator, sunlight: float) -> np.ndarray:
    """Factor on the colours for shadows: the sun's on the ground, and the dark beneath cars, float32 [H, W]."""
    flat = np.array([part.facing == FLAT for part in scene.parts])[scene.seen]
    ambient = 1 - 0.5 * min(sunlight, 1.0)
    kept = np.float32(0.6 * sunlight / (ambient + 0.6 * sunlight) / 255) * scene.shade
    dark = np.float32(_between(rng, (0.5, 0.85)) / 255) * scene.under
    return np.where(flat, (1 - kept) * (1 - dark), np.float32(1))


# ---- air ----


def _haze(picture: np.ndarray, scene: Scene, sky: Sky, rng: np.random.Generator, exposure: float) -> None:
    half = np.float32(_between(rng, (50, 160)) if rng.random() < 0.12 else _between(rng, (250, 1500)))
    share = scene.depth / (scene.depth + half)
    for channel in range(3):
        glow = np.float32(sky.horizon[channel] * min(1.0, exposure * 1.2))
        picture[channel] += (glow - picture[channel]) * share


def _paint_sky(picture: np.ndarray, scene: Scene, sky: Sky, rng: np.random.Generator) -> None:
    """A gradient from the zenith to the horizon, and clouds that lie flat above."""
    rows = slice(0, int((scene.v < 0.02).sum()))
    up = np.maximum(-scene.v[rows], 0)[:, None]
    shown = scene.depth[rows] > _SKY_DEPTH
    low = 1 / (1 + up * np.float32(_between(rng, (2.0, 9.0))))
    size, shift = np.float32(_between(rng, (14, 50))), rng.integers(0, _TILE, size=2)
    flat = size / (up + np.float32(0.10))
    noise = _lay(_coarse(), scene.u[None, :] * flat * 2, flat * 4, shift)
    cover = np.float32(_between(rng, sky.cover))
    clouds = np.clip((noise + 2 * cover - 1) * np.float32(_between(rng, (0.8, 2.5))), 0, 1)
    gain, spread = _between(rng, sky.gain), (rng.random(3) * 2 - 1) * 4
    for channel in range(3):
        zenith, horizon, cloud = (
            np.float32((c[channel] + float(spread[channel])) * gain) for c in (sky.zenith, sky.horizon, sky.cloud)
        )
        plain = zenith + (horizon - zenith) * low
        np.copyto(picture[channel][rows], plain + (cloud - plain) * clouds, where=shown)


# ---- camera ----


def _photograph(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    _develop(picture, rng)
    image = Image.fromarray(_to_uint8(picture.transpose(1, 2, 0)))
    if rng.random() < 0.25:  # a lens and a file that keep less detail than there are pixels
        width, height = (max(1, round(length * _between(rng, (0.5, 0.9)))) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BICUBIC)
    blur = _often_little(rng, 1.0)
    if blur > 0.2:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.UnsharpMask(1.0, int(rng.integers(40, 130)), 2))
    sigma = 0.4 + _often_little(rng, 7.0)
    height, width = picture.shape[1:]
    rows, columns = (
        np.arange(length) + int(shift) & _TILE - 1
        for length, shift in zip((height, width), rng.integers(0, _TILE, 2), strict=True)
    )
    return Image.fromarray(_to_uint8(np.asarray(image) + np.float32(sigma) * _sensor_noise()[rows[:, None], columns]))


@cache
def _sensor_noise() -> np.ndarray:
    """Noise of standard deviation 1, nearly normal, float32 [_TILE, _TILE, 3], made once: it took a quarter of the time."""
    bytes_ = np.random.Generator(np.random.PCG64(9)).integers(0, 256, size=(3, _TILE, _TILE, 3), dtype=np.uint8)
    return (bytes_.astype(np.int16).sum(0) - 382).astype(np.float32) * np.float32(1 / 128)


def _to_uint8(picture: np.ndarray) -> np.ndarray:
    return np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)


def _develop(picture: np.ndarray, rng: np.random.Generator) -> None:
    """White balance, saturation, tone curve, vignette, in place."""
    saturation, bend, vignette = _between(rng, (0.3, 1.0)), _between(rng, (-0.5, 0.5)), _often_little(rng, 0.5)
    warm, green = _between(rng, (-0.06, 0.04)), _between(rng, (-0.025, 0.025))
    grey = picture[0] * np.float32(0.3) + picture[1] * np.float32(0.6) + picture[2] * np.float32(0.1)
    height, width = picture.shape[1:]
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / width * 2 - 1
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) / height * 2 - 1
    falloff = (1 - np.float32(vignette / 2) * (x[None, :] * x[None, :] + y[:, None] * y[:, None])) * np.float32(1 / 255)
    black = np.float32(_often_little(rng, 0.06))
    for plane, gain in zip(picture, (1 + warm, 1 + green, 1 - warm), strict=True):
        plane += (grey - plane) * np.float32(1 - saturation)
        plane *= np.float32(gain)
        plane *= falloff
        np.minimum(plane, 1, out=plane)
        plane *= np.float32(1 + bend) / (1 + np.float32(bend) * plane)
        plane *= (1 - black) * 255
        plane += black * 255
