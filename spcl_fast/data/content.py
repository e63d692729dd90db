"""What files are, wherever they lie: a run that goes on elsewhere knows its data by their names and sizes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from .dataset import Dataset
from .left_out import counted


def content_of(dataset: Dataset) -> str | None:
    """Count and hash of the names and sizes of a data set's images and labels, and of its classes; None for generated scenes. Opens no
    picture.
    """
    lines = []
    for index, name in enumerate(dataset.names):
        files = (dataset.image_path(index), dataset.label_path(index))
        if files[0] is not None:
            lines.append(f"{name}:{':'.join(str(_size(file)) for file in files)}")
    if not lines:
        return None
    ids = b"" if dataset.table is None else dataset.table.key()
    classes = hashlib.sha256("\n".join(dataset.classes.names).encode() + b"\0" + ids).hexdigest()
    return _summary([*lines, f"classes:{classes}"], "image", len(lines), f" of {len(dataset.classes)} classes")


def content_of_path(path: Path) -> str | None:
    """Of a file its bytes, of a folder the names and sizes of its files; None where there is nothing."""
    if path.is_file():
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        return f"a file of {path.stat().st_size} bytes, {digest.hexdigest()[:16]}"
    if not path.is_dir():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return _summary([f"{file.relative_to(path).as_posix()}:{_size(file)}" for file in files], "file")


def _size(path: Path | None) -> int | None:
    try:
        return None if path is None else os.stat(path).st_size
    except OSError:
        return None  # reading it will say what is wrong


def _summary(lines: Iterable[str], what: str, count: int | None = None, more: str = "") -> str | None:
    lines = sorted(lines)
    if not lines:
        return None
    count = len(lines) if count is None else count
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{counted(count, what)}{more}, {digest[:16]}"
