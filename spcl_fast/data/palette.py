"""Labels as pictures: palette PNGs on disk and colours for the eye."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from .files import read_ids

Palette = Sequence[tuple[int, int, int]]


def palette_table(palette: Palette) -> np.ndarray:
    """uint8 [256, 3]: the classes' colours; black for every other value, 255 (ignore) among them."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = np.asarray(palette, np.uint8)
    return table


def colourise(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Train ids [H, W] -> colours uint8 [H, W, 3]; ignored pixels are black."""
    return palette_table(palette)[np.asarray(labels, np.uint8)]


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette, opacity: float = 0.5) -> np.ndarray:
    """The colours of `labels` [H, W] laid over `image` uint8 [H, W, 3]; the picture shows through alone where pixels are ignored."""
    mixed = (1 - opacity) * image + opacity * colourise(labels, palette)
    return np.where((np.asarray(labels) < len(palette))[..., None], mixed, image).round().astype(np.uint8)


def write_label_png(path: str | os.PathLike, labels: np.ndarray, palette: Palette) -> None:
    """Train ids uint8 [H, W] -> 8-bit palette PNG whose pixel values are the ids. Committed by rename: a reader never meets half a file."""
    path = Path(path)
    labels = np.ascontiguousarray(labels)
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError(f"write_label_png: expected uint8 [H, W], got {labels.dtype} {list(labels.shape)}")
    image = Image.fromarray(labels).convert("L")
    image.putpalette(palette_table(palette).tobytes())  # turns L into P and keeps the values
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    image.save(part, format="PNG", compress_level=6)
    os.replace(part, path)


def read_label_png(path: str | os.PathLike) -> np.ndarray:
    """Train ids uint8 [H, W] of a palette or grey PNG; DataError names a file that is broken or has more than 8 bits."""
    ids = read_ids(Path(path))
    if ids.dtype != np.uint8:
        raise DataError(f"label {path} has 16 bits per pixel; expected train ids in an 8-bit palette or grey PNG.")
    return ids
