"""A data set by its name in the catalog: images and labels paired, checked and mapped to the classes that are wanted."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from .. import catalog
from ..config import DataConfig
from ..errors import ConfigError, DataError
from .classes import CITYSCAPES_19, ClassSet, LabelTable, read_classes, read_label_colours
from .colours import Colour
from .dataset import Dataset, FileDataset, Joined, Problem
from .files import inside, read_ids
from .layouts import Layout, ids_reader

log = logging.getLogger("spcl_fast.data")


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

    kind: a name of the catalog's DATA_SETS.
    classes: JSON with "names", "palette" and tables "from" this set's ids; classes_key picks the table (default: the root folder's name,
    the kind for a generated set).
    num_classes: 16 gives Cityscapes, GTA5 and Synscapes the classes of SYNTHIA. labels=False needs no label files at all.
    limit: the first N images only (how many scenes there are, for a generated training split).
    Raises DataError where files are missing or lie outside of `root`, ConfigError for an unknown kind.
    With skip_bad_files an image without label is left out and listed in `.problems`.
    """
    known = catalog.names(catalog.DATA_SETS)
    if kind not in known:
        raise ConfigError(f"dataset {kind!r} is unknown; expected one of {', '.join(known)}.")
    row = catalog.find(catalog.DATA_SETS, kind)
    if not row.needs_root:
        return _generated(kind, split, None if classes is None else Path(classes), classes_key, labels, count=limit)
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"{kind}: the root folder {root} does not exist. Set `root` to the folder that holds the data set."
        )
    layout: Layout = catalog.load(row.home)(root, split, 19 if num_classes is None else num_classes)
    if classes is not None:
        own_colours = bool(layout.classes.names)  # the ids are the set's own, and so are its colours
        shared = _shared_classes(
            layout.classes, layout.table, layout.to_nineteen, root.resolve().name, Path(classes), classes_key
        )
        layout = dataclasses.replace(layout, classes=shared[0], table=shared[1], label_info=None)
        if not own_colours and layout.read_ids is read_ids:
            layout = dataclasses.replace(layout, read_ids=ids_reader(_colours_as_ids(Path(classes), layout.table)))
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
