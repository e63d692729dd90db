"""Pictures for the report: labels laid over images, as data URIs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .. import catalog
from ..data.palette import overlay, read_label_png
from ..runs import layout
from ..runs.reading import RunFolder

WIDTH = 480  # of a picture in the report, in pixels: four of them stand side by side


@dataclass(frozen=True)
class Picture:
    caption: str
    uri: str | None  # None: there is no such picture


class Sample(NamedTuple):
    """An image of the target, next to what nets made of it."""

    name: str
    pictures: list[Picture]
    changed: (
        float | None
    )  # share of its pixels that the final net predicts otherwise than the baseline; None: not known


def label_overlay(
    image: np.ndarray, label: np.ndarray, palette: Sequence[tuple[int, int, int]], opacity: float = 0.6
) -> np.ndarray:
    """Class colours of `label` [H, W] (train ids) over `image` uint8 [h, w, 3] -> uint8 [h, w, 3]; a label of another size is resized
    (nearest).

    Edges between classes are drawn in full colour, so that thin things stay visible; ignored pixels show the image.
    """
    label = np.asarray(label)
    if label.shape != image.shape[:2]:
        label = np.asarray(Image.fromarray(label.astype(np.uint8)).resize(image.shape[1::-1], Image.Resampling.NEAREST))
    soft, full = overlay(image, label, palette, opacity), overlay(image, label, palette, 1.0)
    edge = np.zeros(label.shape, bool)
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    edge[1:, :] |= label[1:, :] != label[:-1, :]
    return np.where(edge[..., None], full, soft)


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def samples(run: RunFolder) -> list[Sample]:
    """For every saved image of the target image | baseline | final net | truth, where there is one; what changed most comes first."""
    nets = [stage for stage in (run.baseline, run.final) if stage] or _unscored(run)
    rows = []
    folder = run.folder / layout.SAMPLES
    with_truth = any(folder.rglob(f"*{layout.TRUTH_SUFFIX}"))
    for path in sorted(folder.rglob(f"*{layout.IMAGE_SUFFIX}")):
        name = path.relative_to(folder).as_posix().removesuffix(layout.IMAGE_SUFFIX)
        try:
            with Image.open(path) as opened:
                image = np.asarray(shrunk(opened.convert("RGB")))
        except OSError as error:
            run.missing.append(f"{path.relative_to(run.folder)} cannot be read ({error}); this picture was left out")
            continue
        labels = [(catalog.title(stage), run.folder / stage / layout.PREDICTIONS / f"{name}.png") for stage in nets]
        labels += [("truth", folder / f"{name}{layout.TRUTH_SUFFIX}")] * with_truth
        row, predicted = [Picture("target image", jpeg(image))], []
        for index, (caption, file) in enumerate(labels):
            label, uri = _overlaid(run, image, file)
            row.append(Picture(caption, uri))
            predicted += [label] if index < len(nets) else []
        rows.append(Sample(name, row, _changed(predicted)))
    return sorted(rows, key=lambda sample: -1.0 if sample.changed is None else sample.changed, reverse=True)


def _changed(predictions: Sequence[np.ndarray | None]) -> float | None:
    """None for one net alone, and where a prediction is not there or is of another size."""
    if len(predictions) != 2:
        return None
    before, after = predictions
    if before is None or after is None or before.shape != after.shape:
        return None
    return float((before != after).mean())


def _unscored(run: RunFolder) -> list[str]:
    """Baseline and final net of a run whose target has no labels: the first and the last one that left predictions."""
    order = (*catalog.with_role("baseline", "start"), *catalog.with_role("result"))
    there = [row.name for row in order if (run.folder / row.name / layout.PREDICTIONS).is_dir()]
    return list(dict.fromkeys([*there[:1], *there[-1:]]))


def _overlaid(run: RunFolder, image: np.ndarray, path: Path) -> tuple[np.ndarray | None, str | None]:
    """A label file as it is, and laid over its image; read once. None, None where it is not there or damaged."""
    if not path.is_file():
        return None, None
    try:
        label = read_label_png(path)
        return label, jpeg(label_overlay(image, label, run.palette))
    except Exception as error:  # a damaged file must not cost the report
        run.missing.append(f"{path.relative_to(run.folder)} cannot be read ({error}); this picture was left out")
        return None, None


def shrunk(image: Image.Image) -> Image.Image:
    if image.width <= 1.5 * WIDTH:
        return image
    return image.resize((WIDTH, max(1, round(image.height * WIDTH / image.width))), Image.Resampling.LANCZOS)


def jpeg(image: np.ndarray) -> str:
    data = BytesIO()
    Image.fromarray(image).save(data, format="JPEG", quality=88, subsampling=0)
    return data_uri(data.getvalue(), "jpeg")
