"""Reading pictures that may be broken or hostile: every failure is a DataError that names the file and what to do.

Only headers are trusted before a picture is decoded, only PNG and JPEG are opened, and a path may not leave its data set's root.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import stat
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..config import LoopConfig
from ..config.text import read_text
from ..errors import DataError
from .colours import LabelColours, check_grey_palette, ids_of_colours
from .orientation import upright

Prepare = Callable[[Image.Image], None]
log = logging.getLogger("spcl_fast.data")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".jpe")
_NOT_IN_NAMES = {
    "Cc",
    "Cs",
    "Zl",
    "Zp",
}  # control characters, bytes that are no text, line separators; any space is fine
# folders that systems add: macOS to a zip file, Synology and QNAP for thumbnails, Windows and Linux for what was removed or found
_NOT_OURS = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
# 67 M pixels, twice the largest driving picture; above it a small file may be a decompression bomb
MAX_PIXELS = LoopConfig.max_pixels
_COLOUR_MODES = ("RGB", "RGBA", "P", "L", "LA", "1")  # what becomes RGB without guessing
_GREY_16 = ("I;16", "I;16B", "I")
_LABEL_MODES = ("1", "L", "P", "RGB", "RGBA", *_GREY_16)
_LOW_BITS = {"L;2": 3, "L;4": 15}  # grey samples that Pillow stretches to 0..255; it leaves palette indices as they are
_REMEDY = "Replace the file, take it out of the data set, or pass --skip-bad-files to leave such files out."


def _decode(path: Path, what: str, prepare: Prepare | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The decoded picture, upright. `prepare` may look at the header and change how it is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
            warnings.filterwarnings("ignore", "Corrupt EXIF data")
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise DataError(f"{what} {path} is no ordinary file. {_REMEDY}")  # opening a pipe would wait for ever
            if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
                Image.MAX_IMAGE_PIXELS = max_pixels  # who raises our limit means Pillow's, too
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                if image.width * image.height > max_pixels:
                    raise DataError(
                        f"{what} {path} says it has {image.width}x{image.height} pixels; more than {max_pixels} are not decoded "
                        f"(a small file can ask for all memory). If it is a large picture that you trust, pass "
                        f"--loop.max_pixels {image.width * image.height}. {_REMEDY}"
                    )
                if prepare is not None:
                    prepare(image)
                image.load()
                return upright(image)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"{what} {path} does not exist. Check the root and the split, or the list file that names it."
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{what} {path} is larger than {max_pixels} pixels and is not decoded: {error}. If it is a large picture that you trust, "
            f"raise --loop.max_pixels. {_REMEDY}"
        ) from error
    except UnidentifiedImageError as error:
        size = path.stat().st_size if path.exists() else 0
        wanted = "is no PNG" if what == "label" else "is neither a PNG nor a JPEG"
        raise DataError(f"{what} {path} {'is empty (0 bytes)' if size == 0 else wanted}. {_REMEDY}") from error
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # decoders of broken files raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise DataError(f"{what} {path} cannot be decoded: {str(error).rstrip(chr(46))}. {_REMEDY}") from error


def _raw_mode(image: Image.Image) -> str:
    """How the samples lie in a file that is open and not decoded yet: "L;2", "RGB;16B", ...; empty where Pillow does not say."""
    tiles = getattr(image, "tile", None)  # what a decoder of Pillow's ImageFile is about to read
    args = tiles[0][3] if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A colour picture as PIL RGB, upright: an orientation in its EXIF block is applied, mirrored ones too.

    Grey, palette and RGBA pictures are converted; 16-bit and other modes raise DataError.
    """

    def check(image: Image.Image) -> None:
        raw = _raw_mode(image)
        if image.mode not in _COLOUR_MODES or raw.endswith(";16B"):  # of 16 bits Pillow would keep the high byte: black
            mode = raw if image.mode in _COLOUR_MODES else image.mode
            raise DataError(
                f"image {path} has mode {mode}; expected 8-bit RGB, grey, palette or RGBA. Save it as 8-bit RGB. {_REMEDY}"
            )

    image = _decode(path, "image", check, max_pixels)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_ids(path: Path, colours: LabelColours | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A label picture with one id per pixel as uint8 or uint16 [H, W]: the samples of a grey or palette PNG of 1 to 16 bits as they are,
    one channel of an RGB PNG whose channels are equal (alpha must be opaque), or the ids of `colours`, which must name every colour in
    the picture exactly.

    An orientation is applied as it is to images. A JPEG raises DataError whatever its name ends in, and so does every other mode.
    """
    largest = 0  # what Pillow makes of the largest sample of a grey PNG with fewer than 8 bits

    def check(image: Image.Image) -> None:
        nonlocal largest
        if image.format != "PNG":
            raise DataError(
                f"label {path} is a JPEG, whatever its name ends in: near edges it holds ids that nobody drew. "
                f"Export the labels again as PNG; a converted JPEG keeps the wrong ids. {_REMEDY}"
            )
        raw = _raw_mode(image)
        if image.mode not in _LABEL_MODES or (raw.endswith(";16B") and image.mode not in _GREY_16):
            raise DataError(
                f"label {path} has mode {raw if raw.endswith(';16B') else image.mode}; expected one class id per pixel: a grey or "
                f"palette PNG. {_REMEDY}"
            )
        largest = _LOW_BITS.get(raw, 0)

    image = _decode(path, "label", check, max_pixels)
    if image.mode in ("RGB", "RGBA"):
        return ids_of_colours(np.asarray(image), colours, f"label {path}")
    if image.mode == "P":
        if colours is not None:
            colours.check_indices(image, f"label {path}")
        check_grey_palette(image, colours, f"label {path}")
    ids = np.asarray(image)
    if image.mode == "1":
        return ids.astype(np.uint8)
    if largest:
        return ids // np.uint8(255 // largest)
    if ids.dtype != np.uint8:
        if ids.min() < 0 or ids.max() > 65535:
            raise DataError(f"label {path} holds ids from {ids.min()} to {ids.max()}; expected 0 to 65535. {_REMEDY}")
        ids = ids.astype(np.uint16)
    return ids


def read_ids_first_channel_16bit(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A SYNTHIA label: 16-bit RGB PNG with the class in the first channel -> uint16 [H, W].

    Pillow decodes such a file to 8 bits and keeps the high byte, which is 0 for every class. It is decoded twice here, once for each
    byte: "RGB;16L" takes the second byte of a sample, which is the low one because PNG is big-endian.
    """
    low, high = (
        np.asarray(_decode(path, "label", functools.partial(_take_byte, path=path, order=order), max_pixels))[..., 0]
        for order in ("L", "B")
    )
    return high.astype(np.uint16) << 8 | low


def _take_byte(image: Image.Image, path: Path, order: str) -> None:
    if image.mode not in ("RGB", "RGBA") or not _raw_mode(image).endswith(";16B"):
        raise DataError(
            f"label {path} is no 16-bit RGB PNG (mode {image.mode}); SYNTHIA keeps the class in the "
            f"first of three 16-bit channels. {_REMEDY}"
        )
    tile: Any = image.tile[0]  # type: ignore[attr-defined]  # there, or _raw_mode would have been empty
    kind, box, offset, args = tile
    changed = args[:-1] + order
    changed_tile = tile._replace(args=changed) if hasattr(tile, "_replace") else (kind, box, offset, changed)
    setattr(image, "tile", [changed_tile])  # noqa: B010


_NO_TEXT = ", or set PYTHONUTF8=1: it is no text in this locale."


def check_name(name: str, where: str) -> str:
    """`name` if it is a relative path that stays below its folder, and text; DataError otherwise. `where` says who named it."""
    path = PurePosixPath(name)
    odd = any(unicodedata.category(c) in _NOT_IN_NAMES for c in name) or "\\" in name or re.match("[A-Za-z]:", name)
    if not name or odd or path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{where} names {name!r}; expected a relative path without '..' and control characters. Correct or rename it"
            + ("." if name.isascii() or not any("\udc80" <= c <= "\udcff" for c in name) else _NO_TEXT)
        )
    return str(path)


class Search(NamedTuple):
    """How folders are searched, whoever reads their layout: set by `searching`."""

    follow_links: bool = False  # out of the root, and links to folders
    skip_odd_names: bool = False


_SEARCH: ContextVar[Search] = ContextVar("search", default=Search())  # noqa: B039  a NamedTuple does not change


@contextlib.contextmanager
def searching(search: Search) -> Iterator[None]:
    """Within it `find_images` and `inside` follow `search`."""
    token = _SEARCH.set(search)
    try:
        yield
    finally:
        _SEARCH.reset(token)


def inside(root: Path, path: Path) -> Path:
    """`path` unless a link leads out of `root` and links are not to be followed; `root` itself may be a link."""
    if _SEARCH.get().follow_links:
        return path
    real, top = os.path.realpath(path), os.path.realpath(root)
    if real != top and not real.startswith(top.rstrip(os.sep) + os.sep):
        raise DataError(
            f"{path} leads out of the data set's root {root}, to {real}. If the links are yours, pass --follow-links; "
            "else copy the files into the root, or give the folder they are in as root."
        )
    return path


def find_images(folder: Path) -> dict[str, Path]:
    """Every PNG and JPEG below `folder` by its name: the relative path without suffix, '/' as separator, sorted. Hidden files and folders
    and __MACOSX are passed over.

    Raises DataError if two files share a name (a.png next to a.jpg), for then a label could belong to either.
    """
    skip = _SEARCH.get().skip_odd_names
    for link in linked_folders(folder):
        log.warning("%s is a link to a folder and is not followed: its images are left out (--follow-links)", link)
    found: dict[str, Path] = {}
    for path in visible_files(folder):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        try:
            name = check_name(path.relative_to(folder).with_suffix("").as_posix(), f"the folder {folder}")
        except DataError as error:
            if not skip:
                raise
            log.warning("left out: %s", error)
            continue
        if name in found:
            raise DataError(f"{found[name]} and {path} have the same name {name!r}. Keep one of them.")
        found[name] = path
    return dict(sorted(found.items()))


def visible_files(folder: Path) -> Iterator[Path]:
    """The files below `folder` that are not hidden and in no hidden folder or __MACOSX, sorted within theirs."""
    follow = _SEARCH.get().follow_links
    for where, folders, files in os.walk(folder, followlinks=follow):
        folders[:] = sorted(name for name in folders if _is_ours(name) and not (follow and _is_loop(where, name)))
        yield from (Path(where, file) for file in sorted(files) if not file.startswith("."))


def linked_folders(folder: Path) -> list[Path]:
    """Links to folders below `folder` that `visible_files` does not follow."""
    follow, found = _SEARCH.get().follow_links, []
    for where, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if _is_ours(name))
        links = (Path(where, name) for name in folders if Path(where, name).is_symlink())
        found += [link for link in links if not follow or _is_loop(where, link.name)]
    return found


def _is_ours(name: str) -> bool:
    return not name.startswith(".") and name not in _NOT_OURS


def _is_loop(where: str, name: str) -> bool:
    """Whether the folder is a link to one that it lies in: following it would never end."""
    path = os.path.join(where, name)
    above, real = os.path.realpath(where), os.path.realpath(path)
    return os.path.islink(path) and (above == real or above.startswith(real.rstrip(os.sep) + os.sep))


def without_image_suffix(name: str) -> str:
    """A name as lists of images have it: "a/b.jpg" is "a/b"."""
    return name[: -len(suffix)] if (suffix := PurePosixPath(name).suffix).lower() in IMAGE_SUFFIXES else name


def read_list(path: Path) -> list[str]:
    """Names in a list file, one per line, without the images' suffix; empty lines and lines that start with # are skipped."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"list file {path} cannot be read: {error}. Expected one file name per line, UTF-8.") from error
    names = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name = check_name(line, f"{path}, line {number},")
        names.append(without_image_suffix(name))
    if not names:
        raise DataError(f"list file {path} names no file. Expected one file name per line.")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"list file {path} names {twice!r} twice. Remove one of the lines.")
    return names
