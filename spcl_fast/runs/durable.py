"""Writing files so that after a crash or a power cut there is either the old content or the new, never a mixture.

Everything goes through `os.*`, one call an operation, so that a test can make the n-th one fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 22


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Create or overwrite `path`, flushed to the disk. Returns its size in bytes and its sha256. The folder's entry is not flushed."""
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            digest.update(rest)
            size += rest.nbytes
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` (creations, renames, removals) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, each flushed into the one above."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    sync_folder(folder.parent)


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Replace `path` in one step: readers see the old content or the new. Returns size and sha256."""
    make_folder(path.parent)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        result = write_file(temporary, chunks)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)
    return result


def replace_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step. NaN and infinity become null: other languages' readers refuse them."""
    replace_file(path, [json.dumps(finite(value), indent=1).encode() + b"\n"])


def finite(value: Any) -> Any:
    """`value` with every float that is not finite replaced by None, down through dicts, lists and tuples."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no reader ever meets a half-removed one: out of sight by a rename first."""
    hidden = folder if folder.name.startswith(".") else folder.with_name(f".removed-{folder.name}-{os.getpid()}")
    if hidden != folder:
        os.rename(folder, hidden)
    shutil.rmtree(hidden)


def file_sha256(path: Path | str) -> str:
    """The sha256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
