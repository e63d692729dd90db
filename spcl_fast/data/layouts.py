"""The layouts of the data sets users own: where images and labels lie, which ids mean what, which split holds which names.

A reader (root, split, num_classes) -> Layout gives the images by name and a function from a name to its label file; `build.py` pairs,
checks and maps them. A new data set is one such function in a file of its own, and one line in the catalog.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError, DataError
from .classes import (
    CITYSCAPES_16,
    CITYSCAPES_19,
    CITYSCAPES_IDS_16,
    CITYSCAPES_IDS_19,
    SIXTEEN_TO_NINETEEN,
    SYNTHIA_IDS_16,
    ClassSet,
    LabelTable,
    read_classes,
    read_label_colours,
)
from .colours import Colour, LabelColours
from .dataset import ReadIds
from .files import find_images, read_ids, read_ids_first_channel_16bit, read_list
from .label_names import LabelBelow, folders_there, same_name

log = logging.getLogger("spcl_fast.data")


class Searched(NamedTuple):
    """Where images were searched, and the names of all that were found there, chosen for the split or not."""

    folder: Path
    names: Collection[str]


@dataclass(frozen=True)
class Layout:
    """What a reader found: images by name, the label file of a name, and the ids in those files."""

    images: dict[str, Path]
    label_of: Callable[[str], Path]
    table: LabelTable
    classes: ClassSet
    read_ids: ReadIds = read_ids
    to_nineteen: dict[int, int] | None = None  # train ids of `table` -> the 19; None: they have no such meaning
    searched: Searched | None = None  # so that what is left out can be said
    label_info: Path | None = None  # the released scripts' file of which image holds which class


def gta5(root: Path, split: str, num_classes: int) -> Layout:
    """images/*.png, labels/*.png with Cityscapes label ids (34 is the licence plate, -1 there)."""
    folder = root / "images"
    everything = images_below(folder)
    classes, table, to_nineteen = _cityscapes_classes(num_classes, known=range(36))
    info = root / "gtav_label_info.p"
    info = info if info.is_file() and num_classes == 19 else None
    return Layout(
        by_list(root, split, everything),
        LabelBelow(root / "labels"),
        table,
        classes,
        to_nineteen=to_nineteen,
        searched=Searched(folder, everything),
        label_info=info,
    )


def synthia(root: Path, split: str, num_classes: int) -> Layout:
    """RAND_CITYSCAPES/{RGB,GT/LABELS}/*.png, 16-bit labels; `root` may be RAND_CITYSCAPES itself. Always the 16 classes."""
    top = root / "RAND_CITYSCAPES" if (root / "RAND_CITYSCAPES").is_dir() else root
    everything = images_below(top / "RGB")
    table = LabelTable.of(SYNTHIA_IDS_16, known=range(23))
    info = root / "synthia_label_info.p"
    return Layout(
        by_list(root, split, everything),
        LabelBelow(top / "GT" / "LABELS"),
        table,
        CITYSCAPES_16,
        read_ids=read_ids_first_channel_16bit,
        to_nineteen=SIXTEEN_TO_NINETEEN,
        searched=Searched(top / "RGB", everything),
        label_info=info if info.is_file() else None,
    )


def synscapes(root: Path, split: str, num_classes: int) -> Layout:
    """img/rgb-2k/*.png, img/class/*.png with Cityscapes label ids."""
    folder = root / "img" / "rgb-2k"
    everything = images_below(folder)
    classes, table, to_nineteen = _cityscapes_classes(num_classes, known=range(36))
    return Layout(
        by_list(root, split, everything),
        LabelBelow(root / "img" / "class"),
        table,
        classes,
        to_nineteen=to_nineteen,
        searched=Searched(folder, everything),
    )


def cityscapes(root: Path, split: str, num_classes: int) -> Layout:
    """leftImg8bit/<split>/<city>/*_leftImg8bit.png, gtFine/<split>/<city>/*_gtFine_labelIds.png; names are city/city_000000_000000."""
    folder = root / "leftImg8bit" / split
    ending = "_leftImg8bit"
    everything = {name[: -len(ending)]: path for name, path in images_below(folder).items() if name.endswith(ending)}
    if not everything:
        raise DataError(
            f"cityscapes: no *{ending}.png below {folder}. Unpack leftImg8bit_trainvaltest.zip so that {folder}/<city>/ holds the images."
        )
    images = by_list(root, split, everything, ending=ending, warns=False)
    classes, table, to_nineteen = _cityscapes_classes(num_classes, known=range(34))
    return Layout(
        images,
        LabelBelow(root / "gtFine" / split, ending="_gtFine_labelIds.png"),
        table,
        classes,
        to_nineteen=to_nineteen,
        searched=Searched(folder, everything),
    )


def folders(root: Path, split: str, num_classes: int) -> Layout:
    """images/<split>/*, labels/<split>/*.png and classes.json; <split>.txt, if there, picks and orders the names. Without split folders
    the list file splits images/*, and without a list every split is all of them."""
    top, list_file = root / "images", root / f"{split}.txt"
    folder = top / split if (top / split).is_dir() else top
    everything = images_below(folder)
    if folder != top:
        images = by_list(root, split, everything, warns=False)
        label_of = LabelBelow(root / "labels" / split)
    else:
        if list_file.is_file():
            images, paths = _listed_anywhere(list_file, everything)
            label_of = LabelBelow(root / "labels", renamed=paths)
        elif any("/" not in name for name in everything):
            images, label_of = by_list(root, split, everything), LabelBelow(root / "labels")
        else:
            splits = ", ".join(sorted({name.split("/")[0] for name in everything})) or "none"
            raise DataError(
                f"folders {root}: no split {split!r}: neither {top / split} nor {list_file} exists. Splits there: {splits}."
            )
    own = root / "classes.json"
    classes = read_classes(own)[0] if own.is_file() else None
    searched = Searched(folder, everything)
    if classes is None:
        return Layout(images, label_of, LabelTable.of({}), _NO_CLASSES, searched=searched)
    table = LabelTable.of({k: k for k in range(len(classes))})
    reader = ids_reader(read_label_colours(own), names_indices=True)
    return Layout(images, label_of, table, classes, read_ids=reader, searched=searched)


_NO_CLASSES = ClassSet((), ())


def ids_reader(colours: tuple[tuple[Colour, int], ...], *, names_indices: bool = False) -> ReadIds:
    """`read_ids`, for labels in these colours, too."""
    return functools.partial(read_ids, colours=LabelColours(colours, names_indices)) if colours else read_ids


def _cityscapes_classes(num_classes: int, known: range) -> tuple[ClassSet, LabelTable, dict[int, int]]:
    if num_classes == 16:
        return CITYSCAPES_16, LabelTable.of(CITYSCAPES_IDS_16, known), SIXTEEN_TO_NINETEEN
    if num_classes == 19:
        return CITYSCAPES_19, LabelTable.of(CITYSCAPES_IDS_19, known), {k: k for k in range(19)}
    raise ConfigError(f"num_classes is {num_classes}; expected 19, or 16 (the classes of SYNTHIA).")


def images_below(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(
            f"the folder {folder} does not exist{folders_there(folder)}. Check the root; docs/data.md shows the layout of each data set."
        )
    return find_images(folder)


def by_list(
    root: Path, split: str, images: dict[str, Path], *, ending: str = "", warns: bool = True
) -> dict[str, Path]:
    """The images that <root>/<split>.txt names, in its order; all of them where there is no such file, with a warning for a val split."""
    list_file = root / f"{split}.txt"
    if not list_file.is_file():
        if warns and split != "train":
            log.warning(
                "%s: there is no %s, so the split %r is all %d images of %s",
                root,
                list_file.name,
                split,
                len(images),
                root,
            )
        return images
    chosen = {}
    for name in read_list(list_file):
        name = name[: -len(ending)] if ending and name.endswith(ending) else name
        found = name if name in images else _composed_otherwise(name, images)
        if found is None:
            near = difflib.get_close_matches(name, images, n=1)
            raise DataError(
                f"{list_file} names {name!r}, but there is no such image below {root}"
                f"{f'; the nearest name is {near[0]!r}' if near else ''}. Correct the list, or add the image."
            )
        chosen[found] = images[found]
    return chosen


def _composed_otherwise(name: str, images: Collection[str]) -> str | None:
    """The image of this name in other Unicode: a list and a file system may write "é" as one letter or as two."""
    if name.isascii():
        return None
    return next((other for other in images if same_name(other) == same_name(name)), None)


def _listed_anywhere(list_file: Path, everything: dict[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """Images that a list names either in full (train/a) or without their split folder (a), and the full name of each."""
    short: dict[str, list[str]] = {}
    for full in everything:
        short.setdefault(full.split("/", 1)[-1], []).append(full)
    images, full_names = {}, {}
    for name in read_list(list_file):
        full = [name] if name in everything else short.get(name, [])
        if len(full) != 1:
            what = "there is no such image" if not full else f"it may be any of {', '.join(full)}"
            raise DataError(
                f"{list_file} names {name!r}, but {what}. Correct the list, or write the name with its folder."
            )
        images[name], full_names[name] = everything[full[0]], full[0]
    return images, full_names
