"""One training sample from a decoded picture: resize, crop, flip, blur, colour. A pure function of the picture and a generator.

The picture is never resized as a whole: the crop is chosen first and Pillow resamples only the box of the original that it needs, so the
cost is that of the output. Colour jitter is one 3x3 matrix and an offset per image, because brightness, contrast, saturation and
a hue rotation are all affine in RGB: about 1 ms for 320x240 on one core, where kornia's ColorJitter with its way through HSV took 20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from ..config import AugmentConfig
from ..errors import ConfigError
from .classes import IGNORE

_PAD = (124, 116, 104)  # mean colour of ImageNet: about 0 after normalisation; the label there is 255
_GREY = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True)
class Window:
    """Which part of the resized image the sample shows: its offset and the size of the resized image, in sample pixels."""

    x: int
    y: int
    resized: tuple[int, int]


def make_sample(
    image: Image.Image,
    label: np.ndarray | None,
    augment: AugmentConfig,
    size: tuple[int, int],
    rng: np.random.Generator,
    rarity: np.ndarray | None,
    out_image: np.ndarray,
    out_label: np.ndarray,
) -> None:
    """Write one sample into out_image float32 [3, h, w] in [0, 1] and out_label uint8 [h, w], where (w, h) = output_size(augment, size).

    image: RGB of any size, taken to `size` (width, height) times a random scale. label: uint8 at that or another size, or None (all 255).
    rarity: weight of each class for a crop around a rare one, [K], or None.
    """
    out_wh = output_size(augment, size)
    window = _choose_window(label, augment, size, out_wh, rng, rarity)
    picture, labels = _cut(image, label, window, out_wh)
    if augment.flip and rng.random() < augment.flip:
        picture, labels = (
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            labels.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        )
    if augment.blur and rng.random() < augment.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(0.1 + 1.4 * rng.random()))
    matrix, offset = _colour_map(picture, augment.jitter, rng)
    _write_colours(np.asarray(picture), matrix, offset, out_image)
    out_label[...] = np.asarray(labels)


def check_augment(augment: AugmentConfig, size: tuple[int, int]) -> None:
    """Raise ConfigError for settings that no sample can be made with."""
    low, high = augment.scale
    if not 0 < low <= high:
        raise ConfigError(f"augment.scale is {low}, {high}; expected 0 < smallest <= largest.")
    if min(*size, *output_size(augment, size)) < 1:
        raise ConfigError(f"size {tuple(size)} and augment.crop {augment.crop} must be at least 1x1.")
    for name in ("flip", "blur", "rare_crop"):
        if not 0 <= getattr(augment, name) <= 1:
            raise ConfigError(f"augment.{name} is {getattr(augment, name)}; expected a probability between 0 and 1.")
    if augment.jitter < 0:
        raise ConfigError(f"augment.jitter is {augment.jitter}; expected 0 (off) or more.")


def output_size(augment: AugmentConfig, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of every sample."""
    width, height = augment.crop or size
    return width, height


def _choose_window(
    label: np.ndarray | None,
    augment: AugmentConfig,
    size: tuple[int, int],
    out_wh: tuple[int, int],
    rng: np.random.Generator,
    rarity: np.ndarray | None,
) -> Window:
    low, high = augment.scale
    factor = low if low == high else math.exp(math.log(low) + (math.log(high) - math.log(low)) * rng.random())
    resized = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
    centre = None
    if augment.rare_crop and label is not None and rarity is not None and rng.random() < augment.rare_crop:
        centre = _rare_pixel(label, rarity, rng)
    x, y = (
        _offset(
            free=resized[axis] - out_wh[axis],
            centre=None if centre is None else centre[axis] * resized[axis],
            length=out_wh[axis],
            rng=rng,
        )
        for axis in (0, 1)
    )
    return Window(x, y, resized)


def _offset(free: int, centre: float | None, length: int, rng: np.random.Generator) -> int:
    """Start of the window along one axis; negative where the image is smaller than the window and gets padded."""
    if free <= 0:
        return -int(rng.integers(0, -free + 1))
    if centre is None:
        return int(rng.integers(0, free + 1))
    return min(max(round(centre - length / 2), 0), free)


def _rare_pixel(label: np.ndarray, rarity: np.ndarray, rng: np.random.Generator) -> tuple[float, float] | None:
    """A pixel of a class drawn by rarity among those present, as (x, y) in [0, 1]; None where nothing is labelled."""
    flat = label.ravel()
    weights = rarity * (np.bincount(flat, minlength=256)[: len(rarity)] > 0)
    if weights.sum() <= 0:
        return None
    chosen = int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right"))
    places = np.flatnonzero(flat == min(chosen, len(rarity) - 1))
    place = int(places[rng.integers(len(places))])
    return (place % label.shape[1] + 0.5) / label.shape[1], (place // label.shape[1] + 0.5) / label.shape[0]


def _cut(
    image: Image.Image, label: np.ndarray | None, window: Window, out_wh: tuple[int, int]
) -> tuple[Image.Image, Image.Image]:
    """The window as pictures of the output's size: bicubic colours, nearest labels, padded with a mean colour and 255."""
    rw, rh = window.resized
    x0, y0 = max(window.x, 0), max(window.y, 0)
    x1, y1 = min(window.x + out_wh[0], rw), min(window.y + out_wh[1], rh)
    box = (x0 / rw, y0 / rh, x1 / rw, y1 / rh)
    part = (x1 - x0, y1 - y0)
    colours = image.resize(part, Image.Resampling.BICUBIC, box=_box_px(box, image.size))
    if label is None:
        labels = Image.new("L", part, IGNORE)
    else:
        labels = Image.fromarray(label)
        labels = labels.resize(part, Image.Resampling.NEAREST, box=_box_px(box, labels.size))
    if part == tuple(out_wh):
        return colours, labels
    at = (x0 - window.x, y0 - window.y)
    padded, padded_labels = Image.new("RGB", out_wh, _PAD), Image.new("L", out_wh, IGNORE)
    padded.paste(colours, at)
    padded_labels.paste(labels, at)
    return padded, padded_labels


def _box_px(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    w, h = size
    return (box[0] * w, box[1] * h, min(box[2] * w, w), min(box[3] * h, h))  # rounding must not leave the picture


def _colour_map(picture: Image.Image, strength: float, rng: np.random.Generator) -> tuple[np.ndarray | None, float]:
    """Matrix [3, 3] and offset of brightness, contrast and saturation of +-strength and a hue turn of +-strength/4 of the circle."""
    if not strength:
        return None, 0.0
    brightness, contrast, saturation = (max(0.0, 1 + strength * (2 * rng.random() - 1)) for _ in range(3))
    angle = 2 * math.pi * strength / 4 * (2 * rng.random() - 1)
    mean = float(_GREY @ np.asarray(picture.reduce(8)).reshape(-1, 3).mean(0)) / 255 * brightness
    turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
    saturate = saturation * np.eye(3) + (1 - saturation) * np.tile(_GREY, (3, 1))
    matrix = _FROM_YIQ @ turn @ _TO_YIQ @ saturate * (contrast * brightness)
    return matrix, (1 - contrast) * mean  # saturation and hue leave grey as it is, so the offset passes through


def _write_colours(pixels: np.ndarray, matrix: np.ndarray | None, offset: float, out: np.ndarray) -> None:
    """uint8 [h, w, 3] -> float32 [3, h, w] in [0, 1]. Plain multiplications and additions: bitwise the same in every process."""
    if matrix is None:
        for channel in range(3):
            np.true_divide(pixels[..., channel], np.float32(255), out=out[channel])
        return
    planes = [np.true_divide(pixels[..., channel], np.float32(255)) for channel in range(3)]
    for channel in range(3):
        total = out[channel]
        np.multiply(planes[0], np.float32(matrix[channel, 0]), out=total)
        total += planes[1] * np.float32(matrix[channel, 1])
        total += planes[2] * np.float32(matrix[channel, 2])
        total += np.float32(offset)
        np.clip(total, 0, 1, out=total)
