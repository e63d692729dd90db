"""A few labelled images of a domain that has no other labels: which ones a setting names, and which of them a fold leaves out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..config.fold import Fold
from ..errors import ConfigError, DataError
from .files import read_list, without_image_suffix
from .left_out import counted
from .sampling import generator


class Chosen(NamedTuple):
    """Images by name; of more than `count` the first ones that have a label. count None: all of them, and each needs its label."""

    names: tuple[str, ...]
    count: int | None = None

    def labelled(self, images: Mapping[str, Path], label_of: Callable[[str], Path]) -> dict[str, Path]:
        """The chosen ones of `images`. Raises DataError where fewer than `count` have a label file."""
        if self.count is None:
            return {name: images[name] for name in self.names}
        found = {name: images[name] for name in self.names if label_of(name).is_file()}
        if len(found) < self.count:
            raise DataError(
                f"target.labelled asks for {self.count} labelled images, and {len(found)} of the {len(self.names)} training images "
                f"have a label; one without is {next(n for n in self.names if n not in found)!r}. Ask for fewer, or add labels."
            )
        return dict(list(found.items())[: self.count])


def choose(wanted: str, names: list[str], seed: int, evaluated: Collection[str] = ()) -> Chosen:
    """What target.labelled says: a number, drawn by the seed so that fewer are a part of more; a list file; or names with commas between.

    evaluated: names of the validation split, which are told apart from typing mistakes. Raises ConfigError for no image, too many, or a
    name that is not among `names`; DataError for a list file that cannot be read.
    """
    if re.fullmatch(r"\s*[+-]?[\d._]*\d%?\s*", wanted):
        count = int(wanted) if wanted.strip().isdigit() else 0
        if not 0 < count <= len(names):
            raise ConfigError(
                f"target.labelled: got {wanted}, expected a whole number from 1 to {len(names)}, the number of training images"
            )
        order = generator(seed, 0).permutation(len(names))
        return Chosen(tuple(names[i] for i in order), count)
    path = Path(wanted).expanduser()
    listed = (
        read_list(path)
        if path.is_file()
        else [without_image_suffix(word.strip()) for word in wanted.split(",") if word.strip()]
    )
    if not listed:
        raise ConfigError("target.labelled: got nothing, expected a number, names with commas between, or a list file")
    known = set(names)
    unknown = next((name for name in listed if name not in known), None)
    if unknown is not None:
        if unknown in set(evaluated):
            raise ConfigError(
                f"target.labelled: {unknown!r} is an image of the validation split, and what is evaluated must not be learned."
            )
        near = difflib.get_close_matches(unknown, names, n=1)
        hint = f"; the nearest name is {near[0]!r}" if near else ""
        if path.is_file():
            what = f"{path} names {unknown!r}, which is no training image{hint}"
        else:
            what = f"target.labelled: there is no such file, nor a training image called {unknown!r}{hint}"
        raise ConfigError(f"{what}. Names are those below the image folder, without the ending.")
    return Chosen(tuple(dict.fromkeys(listed)))


def part_of(names: Sequence[str], fold: Fold, seed: int) -> frozenset[str]:
    """The names of one part of several, drawn by the seed: disjoint, together all of them, of sizes that differ by 1 at most. In which
    order the names are given does not count. Raises ConfigError where there are more parts than names.
    """
    if fold.parts > len(names):
        raise ConfigError(
            f"target.fold: got {fold}, expected at most {len(names)} parts: target.labelled names {counted(len(names), 'image')}, and "
            "every part needs one"
        )
    ordered = sorted(names)
    drawn = generator(seed, 0).permutation(len(ordered))[fold.part - 1 :: fold.parts]
    return frozenset(ordered[i] for i in drawn)
