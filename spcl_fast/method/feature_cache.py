"""CachedFeatures of a frozen net on the disk, computed once: two arrays that are mapped into memory, named after what they were made from.

The name holds a hash of the net (every weight, its mean and standard deviation, how it is built), of the images and labels (names, sizes,
times of change), of the classes and of the size at which the net sees images. Of anything else there is another file: nothing stale is
ever read. A file appears whole, by a rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import distributed
from ..data import Dataset, eval_batches
from ..data.left_out import counted
from ..errors import ConfigError, DataError
from ..models import SegmentationModel
from ..runs.durable import make_folder, sync_folder
from ..train.device import Precision

_VERSION = 1  # of what is in the files


class CachedFeatures(NamedTuple):
    """One row per image. values [N, D, h, w] float16 or float32, labels [N, H, W] uint8: read from the disk where they are used."""

    values: np.ndarray
    labels: np.ndarray
    names: list[str]
    path: Path
    computed: bool  # now, or found on the disk


def cached_features(
    model: SegmentationModel,
    dataset: Dataset,
    size: tuple[int, int],
    folder: Path,
    *,
    dtype: str,
    precision: Precision,
    say: Callable[[str], None],
    stop: Callable[[], None] = lambda: None,
) -> CachedFeatures:
    """The features of every labelled image of `dataset`, seen at `size` (width, height). The main process computes, the others wait.

    Raises DataError for a broken image, ConfigError where the disk has no room or a feature does not fit into `dtype`.
    Memory: the net's own for one image. Disk: N D h w times 2 or 4 bytes, and N W H bytes of labels.
    """
    dataset = _readable(dataset)
    key = _key(model, dataset, size, dtype, precision)
    paths = folder / f"{key}.features.npy", folder / f"{key}.labels.npy"
    computed = False
    if distributed.is_main() and not all(path.is_file() for path in paths):
        computed = True
        with _no_room_in_words(folder):
            make_folder(folder)
            _compute(model, dataset, size, paths, dtype, precision, say, stop)
    distributed.barrier()
    values, labels = (np.load(path, mmap_mode="r") for path in paths)
    return CachedFeatures(values, labels, list(dataset.names), paths[0], computed)


def _readable(dataset: Dataset) -> Dataset:
    """Without the files that cannot be read, where those are skipped: a row stands for an image."""
    if not dataset.skip_bad_files:
        return dataset
    usable = []
    for index in range(len(dataset)):
        with contextlib.suppress(DataError):
            dataset.load(index)
            usable.append(index)
    return dataset.select(usable)


def _key(model: SegmentationModel, dataset: Dataset, size: tuple[int, int], dtype: str, precision: Precision) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted({**model.feature_extractor.state_dict(), "mean": model.mean, "std": model.std}.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    facts: dict[str, Any] = {
        "version": _VERSION,
        "net": (model.name, model.stride, model.channels, str(model.feature_extractor)),
        "size": list(size),
        "dtype": dtype,
        "precision": (precision.name, precision.device.type),
        "data": (dataset.kind, dataset.split, dataset.classes.names, dataset.classes.ignore_index),
        "table": None if dataset.table is None else dataset.table.key().hex(),
        "images": [
            (name, _stamp(dataset.image_path(index)), _stamp(dataset.label_path(index)))
            for index, name in enumerate(dataset.names)
        ],
    }
    digest.update(json.dumps(facts, default=str).encode())
    return digest.hexdigest()[:24]


def _stamp(path: Path | None) -> tuple[int, int] | None:
    """Size and time of change of a file."""
    if path is None:
        return None
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


@contextlib.contextmanager
def _no_room_in_words(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"head.cache_dir: the features cannot be written to {folder}: {error.strerror or error}. Make room, or name another folder."
        ) from error


@torch.no_grad()
def _compute(
    model: SegmentationModel,
    dataset: Dataset,
    size: tuple[int, int],
    paths: tuple[Path, Path],
    dtype: str,
    precision: Precision,
    say: Callable[[str], None],
    stop: Callable[[], None],
) -> None:
    halves = [path.with_name(f".tmp-{path.name}-{os.getpid()}") for path in paths]
    (width, height), count, mode = size, len(dataset), model.training
    values: np.ndarray | None = None
    model.eval()
    try:
        labels = np.lib.format.open_memmap(halves[1], "w+", np.uint8, (count, height, width))
        for row, (image, label, name) in enumerate(eval_batches(dataset, size)):
            stop()
            with precision.autocast():
                features = model.features(image.to(precision.device))[0].float().cpu()
            if values is None:
                shape = (count, *features.shape)
                values = np.lib.format.open_memmap(halves[0], "w+", np.dtype(dtype), shape)
                _check_room(paths[0].parent, values.nbytes + labels.nbytes)
                say(
                    f"features: {counted(count, 'image')}, {list(shape[1:])} each, {values.nbytes / 2**20:.0f} MiB in {paths[0]}"
                )
            values[row] = _as(features, dtype, name)
            assert label is not None  # of a labelled data set
            labels[row] = np.asarray(Image.fromarray(np.asarray(label)).resize(size, Image.Resampling.NEAREST))
        if values is None:
            raise DataError(f"{dataset.kind}, split {dataset.split!r}: no image to compute features of")
        for array, half, path in ((labels, halves[1], paths[1]), (values, halves[0], paths[0])):
            _keep(array, half, path)
    finally:
        model.train(mode)
        for half in halves:
            half.unlink(missing_ok=True)


def _check_room(folder: Path, wanted: int) -> None:
    """A mapped file that outgrows the disk ends the process: ask before."""
    about = os.statvfs(folder)
    free = about.f_bavail * about.f_frsize
    if wanted > free:
        raise ConfigError(
            f"head.cache_dir: the features take {wanted / 2**30:.2f} GiB, and {folder} has {free / 2**30:.2f} GiB left. Name another "
            "folder, or make fewer or smaller features (target.train_images, target.size, a larger model.stride)."
        )


def _as(features: Tensor, dtype: str, name: str) -> np.ndarray:
    array = features.numpy().astype(dtype)
    if not np.isfinite(array).all():
        what = (
            "is not finite"
            if not features.isfinite().all()
            else f"does not fit into {dtype}: give --head.cache_dtype float32"
        )
        raise ConfigError(f"a feature of {name} {what}")
    return array


def _keep(array: np.ndarray, half: Path, path: Path) -> None:
    assert isinstance(array, np.memmap)
    array.flush()
    with open(half, "rb") as file:
        os.fsync(file.fileno())
    os.replace(half, path)
    sync_folder(path.parent)
