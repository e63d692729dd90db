"""Whether a command can write to the places it was given, found out before hours of work instead of after."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import ConfigError


def check_folder(folder: Path, option: str) -> None:
    """Raise ConfigError unless files can be written below `folder`, which need not exist yet. Leaves nothing behind."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{option} {folder}: {there} is a file, not a folder. Name another folder.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} {folder}: cannot be written: {error.strerror} ({there}). Name another folder, or change its permissions."
        ) from error


def check_file(path: Path, option: str) -> None:
    """Raise ConfigError unless the file `path` can be written; its folder need not exist yet."""
    if path.is_dir():
        raise ConfigError(f"{option} {path}: that is a folder. Name a file in it.")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{option} {path}: the file may not be written. Name another, or change its permissions.")
    check_folder(path.parent, option)


def check_apart(images: Path, output: Path) -> None:
    """Raise ConfigError where pictures written to `output` would be taken for images of `images` the next time."""
    if images.is_dir() and (output.resolve() == images.resolve() or images.resolve() in output.resolve().parents):
        raise ConfigError(
            f"predict: {output} lies in the folder of the images, {images}: its masks and overlays would be images the next time. "
            "Name a folder outside of it."
        )
