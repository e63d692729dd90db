"""A data set by its name in the catalog: images and labels paired, checked and mapped to the classes that are wanted."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

from .. import catalog
from ..config import DataConfig, LoopConfig
from ..errors import ConfigError, DataError
from .classes import CITYSCAPES_19, ClassSet, LabelTable, read_classes, read_label_colours
from .colours import Colour
from .dataset import Dataset, FileDataset, Merged, Problem
from .files import MAX_PIXELS, Search, inside, read_ids, searching
from .label_names import LabelBelow, missing_label
from .labelled import Chosen
from .layouts import Layout, ids_reader
from .left_out import counted, labels_without_image, left_out_images

log = logging.getLogger("spcl_fast.data")


class UnlabelledError(DataError):
    """Not one image of a split has a label: meant for a target, a mistake for a source."""


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
    label_ending: str | None = None,
    only: Chosen | None = None,
    skip_bad_files: bool = False,
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """A data set by name. Only names and paths are read here; pictures when they are asked for.

    kind: a name of the catalog's DATA_SETS.
    classes: JSON with "names", "palette" and tables "from" this set's ids; classes_key picks the table (default: the root folder's name,
    the kind for a generated set).
    num_classes: 16 gives Cityscapes, GTA5 and Synscapes the classes of SYNTHIA. labels=False needs no label files at all.
    limit: the first N images only (how many scenes there are, for a generated training split).
    Raises DataError where files are missing or lie outside of `root`, ConfigError for an unknown kind.
    label_ending: what follows an image's name in its label's, such as "_mask.png"; None: what the layout says (".png").
    only: these images alone, so that no other one needs a label (not for generated scenes).
    With skip_bad_files an image without label is left out and listed in `.problems`. What lies in the folders and is no image or label of
    this set is logged and listed in `.left_out`. follow_links: read links that lead out of `root`. max_pixels: larger pictures are refused.
    """
    known = catalog.names(catalog.DATA_SETS)
    if kind not in known:
        raise ConfigError(f"dataset {kind!r} is unknown; expected one of {', '.join(known)}.")
    row = catalog.find(catalog.DATA_SETS, kind)
    if not row.needs_root:
        return _generated(kind, split, None if classes is None else Path(classes), classes_key, labels, count=limit)
    root = Path(root)
    if not root.is_dir():
        what = "is a file, not a folder" if root.is_file() else "does not exist"
        raise DataError(f"{kind}: the root folder {root} {what}. Set `root` to the folder that holds the data set.")
    search = Search(follow_links, skip_odd_names=skip_bad_files)
    with searching(search):
        layout: Layout = catalog.load(row.home)(root, split, 19 if num_classes is None else num_classes)
    if label_ending is not None:
        if not isinstance(layout.label_of, LabelBelow):
            raise ConfigError(f"label_ending: {kind} has labels that are not found by name. Leave label_ending out.")
        layout = dataclasses.replace(layout, label_of=dataclasses.replace(layout.label_of, ending=label_ending))
    if classes is not None:
        own_colours = bool(layout.classes.names)  # the ids are the set's own, and so are its colours
        shared = _shared_classes(
            layout.classes, layout.table, layout.to_nineteen, root.resolve().name, Path(classes), classes_key
        )
        layout = dataclasses.replace(layout, classes=shared[0], table=shared[1], label_info=None)
        if not own_colours and layout.read_ids is read_ids:
            layout = dataclasses.replace(layout, read_ids=ids_reader(_colours_as_ids(Path(classes), layout.table)))
    if only is not None:
        images = only.labelled(layout.images, layout.label_of)
        layout = dataclasses.replace(layout, images=images, searched=None)
    if not layout.classes.names:
        raise DataError(
            f"folders {root}: there is no {root / 'classes.json'} and no `classes` file was given. "
            f'Add one: {{"names": [..], "palette": [..]}}.'
        )
    if max_pixels != MAX_PIXELS:
        layout = dataclasses.replace(layout, read_ids=functools.partial(layout.read_ids, max_pixels=max_pixels))
    with searching(search):
        dataset = _pair(kind, root, split, layout, labels, limit, skip_bad_files)
        dataset.left_out = _left_out(layout, labels)
    for problem in dataset.left_out:
        log.warning("%s, split %r: %s: %s", kind, split, problem.name, problem.what)
    dataset.follow_links, dataset.max_pixels = follow_links, max_pixels
    return dataset


def _left_out(layout: Layout, labels: bool) -> list[Problem]:
    if layout.searched is None:
        return []
    problems = left_out_images(layout.searched.folder)
    if labels and isinstance(layout.label_of, LabelBelow):
        problems += labels_without_image(layout.label_of, layout.searched.names)
    return problems


def dataset_of(
    config: DataConfig,
    split: str,
    *,
    labels: bool = True,
    only: Chosen | None = None,
    reading: LoopConfig | None = None,
) -> Dataset:
    """The data set that the settings of a domain describe; `train_images` bounds the training split alone. `only`: these images of it.
    `reading`: of the settings `loop`, what says how files are read (skip_bad_files, follow_links, max_pixels).

    "folders+generated_driver" is both, the generated scenes with `size` pixels and not bounded.
    """
    reading = LoopConfig() if reading is None else reading
    kind, _, generated = config.dataset.partition("+")
    dataset = build_dataset(
        kind,
        config.root,
        split,
        classes=config.classes,
        classes_key=config.classes_key,
        num_classes=config.num_classes,
        labels=labels,
        limit=config.train_images if split == config.train_split and only is None else None,
        label_ending=config.label_ending,
        only=only,
        skip_bad_files=reading.skip_bad_files,
        follow_links=reading.follow_links,
        max_pixels=reading.max_pixels,
    )
    if not generated:
        return dataset
    path = None if config.classes is None else Path(config.classes)
    return Merged(
        dataset,
        _generated(generated, "train" if split == config.train_split else "val", path, None, labels, size=config.size),
    )


def _pair(
    kind: str, root: Path, split: str, layout: Layout, labels: bool, limit: int | None, skip_bad_files: bool
) -> FileDataset:
    images: dict[str, Path] = {}
    label_files: list[Path] = []
    problems: list[Problem] = []
    without = 0
    for name, path in layout.images.items():
        if limit is not None and len(images) == limit:
            break
        try:
            inside(root, path)
            if labels:
                label = layout.label_of(name)
                if not label.is_file():
                    without += 1
                    raise DataError(missing_label(path, label))
                label_files.append(inside(root, label))
        except DataError as error:
            problems.append(Problem(name, str(error)))
            continue
        images[name] = path
    more = f" ({len(problems)} files of {len(layout.images)} have such a problem.)" if len(problems) > 1 else ""
    if without and without == len(problems) and not images:
        none = f"none of {counted(without, 'image')} has a label"
        raise UnlabelledError(f"{kind} {root}, split {split!r}: {none}. {problems[0].what}{more}")
    if problems and (not skip_bad_files or not images):
        advice = (
            " Give every image a label, or pass --skip-bad-files to leave those images out."
            if without and images
            else ""
        )
        raise DataError(f"{kind} {root}, split {split!r}: {problems[0].what}{more}{advice}")
    if not images:
        raise DataError(
            f"{kind} {root}, split {split!r}: no images found. Expected PNG or JPEG files; see docs/data.md for the layout."
            + "".join(f" {problem.what}" for problem in _left_out(layout, labels=False))
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
        # without a classes.json of its own it is not known which ids the set has: those the table leaves out are ignored on purpose
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
    from .generated import GeneratedDataset, domain_of

    if path is None:
        return GeneratedDataset(kind, split, has_labels=labels, **scenes)
    own = domain_of(kind).classes
    given, tables = read_classes(path)
    if not tables and given.names != own.names:
        raise DataError(
            f'classes file {path} has other classes than {kind}. Add a table of its ids: "from": {{{kind!r}: {{old id: new id}}}}.'
        )
    ids = {k: k for k in range(len(own))}
    classes, table = _shared_classes(own, LabelTable.of(ids), ids if own == CITYSCAPES_19 else None, kind, path, key)
    return GeneratedDataset(kind, split, has_labels=labels, classes=classes, table=table, **scenes)


def _colours_as_ids(path: Path, table: LabelTable) -> tuple[tuple[Colour, int], ...]:
    """The colours of a classes file as ids of a set without classes of its own: one that its table takes to the colour's class."""
    classes = table.lookup.tolist()
    return tuple((colour, classes.index(k)) for colour, k in read_label_colours(path) if k in classes)


def _known(table: LabelTable) -> list[int]:
    return table.known.nonzero()[0].tolist()
