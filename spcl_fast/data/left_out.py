"""Files that lie where images or labels do and are not read: said before training, and a problem in `check-data`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import DataError
from .dataset import Problem
from .files import IMAGE_SUFFIXES, check_name, linked_folders, visible_files
from .label_names import LabelBelow

_OTHER_PICTURES = {
    ".bmp", ".gif", ".tif", ".tiff", ".webp", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".ppm",
    ".pgm", ".pnm", ".tga", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw", ".raw", ".npy", ".svg",
}  # fmt: skip
_FIRST_BYTES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"\x00\x00\x00\x0cjP")
_SHOWN = 4


def left_out_images(folder: Path) -> list[Problem]:
    """Pictures below `folder` of other formats or endings, names that cannot be read, and links to folders that are not followed."""
    others, odd = [], []
    for path in visible_files(folder):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            if path.suffix.lower() in _OTHER_PICTURES or _is_picture(path):
                others.append(path)
            continue
        try:
            check_name(path.relative_to(folder).as_posix(), "")
        except DataError:
            odd.append(repr(path.name))
    problems = []
    if others:
        text = (
            f"{_count(others)} {'is neither PNG nor JPEG' if len(others) == 1 else 'are neither PNG nor JPEG'} by name and left out: "
            f"{_listed(path.name for path in others)}. Save them as PNG or JPEG with the ending .png or .jpg."
        )
        problems.append(Problem(str(folder), text))
    if odd:
        problems.append(
            Problem(str(folder), f"{_count(odd)} left out for control characters in the name: {_listed(odd)}.")
        )
    for link in linked_folders(folder):
        problems.append(Problem(str(link), "is a link to a folder and not followed. Pass --follow-links to read it."))
    return problems


def labels_without_image(label_of: LabelBelow, names: Iterable[str]) -> list[Problem]:
    """Label files that belong to none of the images of these names."""
    expected = {label_of(name) for name in names}
    ending = label_of.ending.lower()
    found = [path for path in visible_files(label_of.folder) if path.name.lower().endswith(ending)]
    orphans = sorted(path.relative_to(label_of.folder).as_posix() for path in found if path not in expected)
    if not orphans:
        return []
    text = f"{_count(orphans, 'label')} without an image: {_listed(orphans)}. Add the images, or take the labels out."
    return [Problem(str(label_of.folder), text)]


def _is_picture(path: Path) -> bool:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            start = file.read(16)
    except OSError:
        return False
    return start.startswith(_FIRST_BYTES) or start[:4] == b"RIFF" and start[8:12] == b"WEBP"


def counted(number: int, what: str) -> str:
    """1 image, 2 images."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _count(files: list, what: str = "file") -> str:
    return counted(len(files), what)


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")
