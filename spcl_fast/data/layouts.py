"""The layouts of the data sets users own: where images and labels lie, which ids mean what, which split holds which names.

A reader returns the images by name and a function from a name to its label file; `build_dataset` pairs, checks and maps them.
New data set: one function, one entry in READERS, its name among the settings' choices in rules.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import DataConfig
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
)
from .dataset import Dataset, FileDataset, Joined, Problem, PseudoLabelled, ReadIds
from .files import find_images, inside, read_ids, read_ids_first_channel_16bit, read_list

log = logging.getLogger("spcl_fast.data")

GENERATED = ("generated_source", "generated_target", "generated_driver")


@dataclass(frozen=True)
class Layout:
    """What a reader found: images by name, the label file of a name, and the ids in those files."""

    images: dict[str, Path]
    label_of: Callable[[str], Path]
    table: LabelTable
    classes: ClassSet
    read_ids: ReadIds = read_ids
    to_nineteen: dict[int, int] | None = None  # train ids of `table` -> the 19; None: they have no such meaning
    label_info: Path | None = None  # the released scripts' file of which image holds which class


def build_dataset(
    kind: str,
    root: str | Path,
    split: str,
    *,
    classes: str | Path | None = None,
    classes_key: str | None = None,
    num_classes: int | None = None,
    labels: bool = True,
    limit: int | None = None,
    skip_bad_files: bool = False,
) -> Dataset:
    """A data set by name. Only names and paths are read here; pictures when they are asked for.

    kind: generated_source | generated_target | generated_driver | gta5 | synthia | synscapes | cityscapes | folders.
    classes: JSON with "names", "palette" and tables "from" this set's ids; classes_key picks the table (default: the root folder's name,
    the kind for a generated set).
    num_classes: 16 gives Cityscapes, GTA5 and Synscapes the classes of SYNTHIA. labels=False needs no label files at all.
    limit: the first N images only (how many scenes there are, for a generated training split).
    Raises DataError where files are missing or lie outside of `root`, ConfigError for an unknown kind.
    With skip_bad_files an image without label is left out and told in `.problems`.
    """
    if kind in GENERATED:
        return _generated(kind, split, None if classes is None else Path(classes), classes_key, labels, count=limit)
    if kind not in READERS:
        raise ConfigError(f"dataset {kind!r} is unknown; expected one of {', '.join((*GENERATED, *READERS))}.")
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"{kind}: the root folder {root} does not exist. Set `root` to the folder that holds the data set."
        )
    layout = READERS[kind](root, split, 19 if num_classes is None else num_classes)
    if classes is not None:
        shared = _shared_classes(
            layout.classes, layout.table, layout.to_nineteen, root.resolve().name, Path(classes), classes_key
        )
        layout = Layout(layout.images, layout.label_of, shared[1], shared[0], layout.read_ids)
    if not layout.classes.names:
        raise DataError(
            f"folders {root}: there is no {root / 'classes.json'} and no `classes` file was given. "
            f'Add one: {{"names": [..], "palette": [..]}}.'
        )
    return _pair(kind, root, split, layout, labels, limit, skip_bad_files)


def dataset_of(config: DataConfig, split: str, *, labels: bool = True, skip_bad_files: bool = False) -> Dataset:
    """The data set that the settings of a domain describe; `train_images` bounds the training split alone.

    "folders+generated_driver" is both, the generated scenes with `size` pixels and not bounded.
    """
    kind, _, generated = config.dataset.partition("+")
    dataset = build_dataset(
        kind,
        config.root,
        split,
        classes=config.classes,
        classes_key=config.classes_key,
        num_classes=config.num_classes,
        labels=labels,
        limit=config.train_images if split == config.train_split else None,
        skip_bad_files=skip_bad_files,
    )
    if not generated:
        return dataset
    path = None if config.classes is None else Path(config.classes)
    return Joined(
        dataset,
        _generated(generated, "train" if split == config.train_split else "val", path, None, labels, size=config.size),
    )


def with_pseudo_labels(dataset: Dataset, folder: str | Path) -> Dataset:
    """The images of `dataset` with the labels of folder/<name>.png, as train ids; files flat under the last part of the name also count,
    as the released code writes them. Raises DataError for an image without a file (left out with skip_bad_files)."""
    folder = Path(folder)
    found, keep, problems = [], [], []
    for index, name in enumerate(dataset.names):
        last = name.rsplit("/", 1)[-1]
        candidates = (folder / f"{name}.png", folder / f"{last}.png", folder / f"{last}_leftImg8bit.png")
        path = next((c for c in candidates if c.is_file()), None)
        if path is None:
            problems.append(Problem(name, f"no pseudo-label: expected {candidates[0]}"))
            continue
        found.append(inside(folder, path))
        keep.append(index)
    if problems and not dataset.skip_bad_files or not found:
        raise DataError(
            f"{len(problems)} of {len(dataset)} images have no pseudo-label; the first is {problems[0].name!r}: "
            f"expected {folder / problems[0].name}.png. "
            "Make them with `spcl-fast pseudo-label`."
        )
    result = PseudoLabelled(dataset.select(keep) if problems else dataset, folder, found)
    result.problems = problems
    return result


def _pair(
    kind: str, root: Path, split: str, layout: Layout, labels: bool, limit: int | None, skip_bad_files: bool
) -> FileDataset:
    images: dict[str, Path] = {}
    label_files: list[Path] = []
    problems: list[Problem] = []
    for name, path in layout.images.items():
        if limit is not None and len(images) == limit:
            break
        try:
            inside(root, path)
            if labels:
                label = layout.label_of(name)
                if not label.is_file():
                    raise DataError(f"image {path} has no label: expected {label}.")
                label_files.append(inside(root, label))
        except DataError as error:
            problems.append(Problem(name, str(error)))
            continue
        images[name] = path
    if problems and (not skip_bad_files or not images):
        more = f" ({len(problems)} files of {len(layout.images)} have such a problem.)" if len(problems) > 1 else ""
        advice = " Give every image a label, or pass --skip-bad-files to leave those images out." if labels else ""
        raise DataError(f"{kind} {root}, split {split!r}: {problems[0].what}{more}{advice}")
    if not images:
        raise DataError(
            f"{kind} {root}, split {split!r}: no images found. Expected PNG or JPEG files; see docs/data.md for the layout."
        )
    for problem in problems:
        log.warning("left out %s: %s", problem.name, problem.what)
    dataset = FileDataset(
        kind, split, layout.classes, images, label_files=label_files if labels else None, table=layout.table, read_ids=layout.read_ids,
        skip_bad_files=skip_bad_files,
    )  # fmt: skip
    dataset.problems = problems
    dataset.label_info = layout.label_info
    return dataset


def _shared_classes(
    own: ClassSet, table: LabelTable, to_nineteen: dict[int, int] | None, name: str, path: Path, key: str | None
) -> tuple[ClassSet, LabelTable]:
    """A classes file's classes and the map of a set's ids to them, by the table called `key` or like the set: from its own ids, or from the
    19 where the file has only those. `own`, `table` and `to_nineteen` are the set's classes and maps without the file."""
    classes, tables = read_classes(path)
    wanted = key or name
    if wanted in tables and (wanted != "cityscapes19" or to_nineteen is None):
        # without a classes.json of its own nobody knows which ids the set has: those the table leaves out are ignored on purpose
        return classes, LabelTable.of(tables[wanted], known=_known(table) if own.names else range(65536))
    if to_nineteen is not None and "cityscapes19" in tables and key in (None, "cityscapes19"):
        return classes, table.then(to_nineteen).then(tables["cityscapes19"])
    if not tables and key is None:
        return classes, LabelTable.of({k: k for k in range(len(classes))})
    raise DataError(
        f"classes file {path} has no table {wanted!r}; it has {', '.join(map(repr, tables)) or 'none'}. Set classes_key "
        f"to one of them, "
        f'or add "from": {{{wanted!r}: {{old id: new id}}}}.'
    )


def _generated(kind: str, split: str, path: Path | None, key: str | None, labels: bool, **scenes: Any) -> Dataset:
    """A generated set with its own classes, or with those of a classes file. scenes: `count` and `size` of GeneratedDataset."""
    from .generated import DOMAINS, GeneratedDataset

    if path is None:
        return GeneratedDataset(kind, split, has_labels=labels, **scenes)
    own = DOMAINS[kind].classes
    given, tables = read_classes(path)
    if not tables and given.names != own.names:
        raise DataError(
            f'classes file {path} has other classes than {kind}. Add a table of its ids: "from": {{{kind!r}: {{old id: new id}}}}.'
        )
    ids = {k: k for k in range(len(own))}
    classes, table = _shared_classes(own, LabelTable.of(ids), ids if own == CITYSCAPES_19 else None, kind, path, key)
    return GeneratedDataset(kind, split, has_labels=labels, classes=classes, table=table, **scenes)


def _known(table: LabelTable) -> list[int]:
    return table.known.nonzero()[0].tolist()


# ---- layouts ----


def _gta5(root: Path, split: str, num_classes: int) -> Layout:
    """images/*.png, labels/*.png with Cityscapes label ids (34 is the licence plate, -1 there)."""
    images = _by_list(root, split, _images_below(root / "images"))
    classes, table, to_nineteen = _cityscapes_classes(num_classes, known=range(36))
    info = root / "gtav_label_info.p"
    info = info if info.is_file() and num_classes == 19 else None
    return Layout(images, _LabelBelow(root / "labels"), table, classes, to_nineteen=to_nineteen, label_info=info)


def _synthia(root: Path, split: str, num_classes: int) -> Layout:
    """RAND_CITYSCAPES/{RGB,GT/LABELS}/*.png, 16-bit labels; `root` may be RAND_CITYSCAPES itself. Always the 16 classes."""
    top = root / "RAND_CITYSCAPES" if (root / "RAND_CITYSCAPES").is_dir() else root
    images = _by_list(root, split, _images_below(top / "RGB"))
    table = LabelTable.of(SYNTHIA_IDS_16, known=range(23))
    info = root / "synthia_label_info.p"
    return Layout(
        images,
        _LabelBelow(top / "GT" / "LABELS"),
        table,
        CITYSCAPES_16,
        read_ids=read_ids_first_channel_16bit,
        to_nineteen=SIXTEEN_TO_NINETEEN,
        label_info=info if info.is_file() else None,
    )


def _synscapes(root: Path, split: str, num_classes: int) -> Layout:
    """img/rgb-2k/*.png, img/class/*.png with Cityscapes label ids."""
    images = _by_list(root, split, _images_below(root / "img" / "rgb-2k"))
    classes, table, to_nineteen = _cityscapes_classes(num_classes, known=range(36))
    return Layout(images, _LabelBelow(root / "img" / "class"), table, classes, to_nineteen=to_nineteen)


def _cityscapes(root: Path, split: str, num_classes: int) -> Layout:
    """leftImg8bit/<split>/<city>/*_leftImg8bit.png, gtFine/<split>/<city>/*_gtFine_labelIds.png; names are city/city_000000_000000."""
    folder = root / "leftImg8bit" / split
    ending = "_leftImg8bit"
    images = {name[: -len(ending)]: path for name, path in _images_below(folder).items() if name.endswith(ending)}
    if not images:
        raise DataError(
            f"cityscapes: no *{ending}.png below {folder}. Unpack leftImg8bit_trainvaltest.zip so that {folder}/<city>/ holds the images."
        )
    images = _by_list(root, split, images, ending=ending, told=False)
    classes, table, to_nineteen = _cityscapes_classes(num_classes, known=range(34))
    return Layout(
        images,
        _LabelBelow(root / "gtFine" / split, ending="_gtFine_labelIds.png"),
        table,
        classes,
        to_nineteen=to_nineteen,
    )


def _folders(root: Path, split: str, num_classes: int) -> Layout:
    """images/<split>/*, labels/<split>/*.png and classes.json; <split>.txt, if there, picks and orders the names. Without split folders
    the list file splits images/*, and without a list every split is all of them."""
    top, list_file = root / "images", root / f"{split}.txt"
    if (top / split).is_dir():
        images, label_of = (
            _by_list(root, split, _images_below(top / split), told=False),
            _LabelBelow(root / "labels" / split),
        )
    else:
        everything = _images_below(top)
        if list_file.is_file():
            images, paths = _listed_anywhere(list_file, everything)
            label_of = _LabelBelow(root / "labels", renamed=paths)
        elif any("/" not in name for name in everything):
            images, label_of = _by_list(root, split, everything), _LabelBelow(root / "labels")
        else:
            folders = sorted({name.split("/")[0] for name in everything})
            raise DataError(
                f"folders {root}: no split {split!r}: neither {top / split} nor {list_file} exists. Splits there: {', '.join(folders)}."
            )
    own = root / "classes.json"
    classes = read_classes(own)[0] if own.is_file() else None
    if classes is None:
        return Layout(images, label_of, LabelTable.of({}), _NO_CLASSES)
    return Layout(images, label_of, LabelTable.of({k: k for k in range(len(classes))}), classes)


_NO_CLASSES = ClassSet((), ())

READERS: dict[str, Callable[[Path, str, int], Layout]] = {
    "gta5": _gta5,
    "synthia": _synthia,
    "synscapes": _synscapes,
    "cityscapes": _cityscapes,
    "folders": _folders,
}


def _cityscapes_classes(num_classes: int, known: range) -> tuple[ClassSet, LabelTable, dict[int, int]]:
    if num_classes == 16:
        return CITYSCAPES_16, LabelTable.of(CITYSCAPES_IDS_16, known), SIXTEEN_TO_NINETEEN
    if num_classes == 19:
        return CITYSCAPES_19, LabelTable.of(CITYSCAPES_IDS_19, known), {k: k for k in range(19)}
    raise ConfigError(f"num_classes is {num_classes}; expected 19, or 16 (the classes of SYNTHIA).")


def _images_below(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(
            f"the folder {folder} does not exist. Check the root; docs/data.md shows the layout of each data set."
        )
    return find_images(folder)


def _by_list(
    root: Path, split: str, images: dict[str, Path], *, ending: str = "", told: bool = True
) -> dict[str, Path]:
    """The images that <root>/<split>.txt names, in its order; all of them where there is no such file, which is `told` for a val split."""
    list_file = root / f"{split}.txt"
    if not list_file.is_file():
        if told and split != "train":
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
        if name not in images:
            raise DataError(
                f"{list_file} names {name!r}, but there is no such image below {root}. Correct the list, or add the image."
            )
        chosen[name] = images[name]
    return chosen


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


@dataclass(frozen=True)
class _LabelBelow:
    """The label file of a name: folder/<name><ending>, where `renamed` may know the name by another."""

    folder: Path
    ending: str = ".png"
    renamed: dict[str, str] = field(default_factory=dict)

    def __call__(self, name: str) -> Path:
        return self.folder / (self.renamed.get(name, name) + self.ending)
