"""What the classes are called, how they are coloured, and how each data set's own ids become train ids.

A train id is 0 .. K-1, or 255 where a pixel takes no part in a loss or a score.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..config.text import read_text
from ..errors import DataError

IGNORE = 255
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class ClassSet:
    """Names and colours (RGB, 0-255) of the train ids; `ignore_index` marks pixels without a class."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = IGNORE

    def __len__(self) -> int:
        return len(self.names)

    def named(self, names: str) -> tuple[str, ...]:
        """The names in a text with commas. Raises ValueError for one that no class has, or none."""
        found = tuple(word.strip() for word in names.split(",") if word.strip())
        unknown = [name for name in found if name not in self.names]
        if unknown or not found:
            wrong = f"no class is called {unknown[0]!r}" if unknown else f"{names!r} names no class"
            raise ValueError(f"{wrong}; there are {', '.join(self.names)}.")
        return found

    def as_json(self) -> dict[str, Any]:
        """What a classes.json holds, as `read_classes` reads it."""
        palette = [list(colour) for colour in self.palette]
        return {"names": list(self.names), "palette": palette, "ignore_index": self.ignore_index}


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, a number behind one that an earlier class has: "tree", "road", "tree (2)". A file with such classes is refused."""
    found: list[str] = []
    for name in names:
        number, shown = 1, name
        while shown in found:
            number += 1
            shown = f"{name} ({number})"
        found.append(shown)
    return tuple(found)


CITYSCAPES_19 = ClassSet(
    names=(
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
        "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ),
    palette=(
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
        (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
        (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
)  # fmt: skip

# SYNTHIA has 16 of the 19: no terrain, truck, train
_SIXTEEN = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
CITYSCAPES_16 = ClassSet(
    tuple(CITYSCAPES_19.names[k] for k in _SIXTEEN), tuple(CITYSCAPES_19.palette[k] for k in _SIXTEEN)
)
SIXTEEN_TO_NINETEEN: dict[int, int] = dict(enumerate(_SIXTEEN))
# the 13-class mean of the SYNTHIA literature leaves out wall, fence and pole
THIRTEEN_OF_SIXTEEN = tuple(k for k in range(16) if k not in (3, 4, 5))

CITYSCAPES_IDS_19 = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
    28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
CITYSCAPES_IDS_16 = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 23: 9, 24: 10, 25: 11, 26: 12, 28: 13, 32: 14, 33: 15,
}  # fmt: skip
SYNTHIA_IDS_16 = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 9, 10: 10, 17: 11, 8: 12, 19: 13, 12: 14, 11: 15,
}  # fmt: skip

_FULL = 65536  # one entry per 16-bit id, so that no reader needs a special case; 64 KB


@dataclass(frozen=True, eq=False)
class LabelTable:
    """A data set's own ids -> train ids, by one lookup.

    `lookup` is uint8 [65536], 255 where an id has no train id; `known` is bool [65536]: ids that the data set is known to hold,
    so that `check_data` can tell an ignored id from an unknown one.
    """

    lookup: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, mapping: dict[int, int], known: Any = ()) -> LabelTable:
        lookup = np.full(_FULL, IGNORE, np.uint8)
        is_known = np.zeros(_FULL, bool)
        for old, new in mapping.items():
            lookup[old] = new
            is_known[old] = True
        is_known[list(known)] = True
        is_known[IGNORE] = True
        return cls(lookup, is_known)

    def then(self, mapping: dict[int, int]) -> LabelTable:
        """This table followed by a map from its train ids to others; what is not listed becomes 255."""
        second = np.full(256, IGNORE, np.uint8)
        for old, new in mapping.items():
            second[old] = new
        second[IGNORE] = IGNORE
        return LabelTable(second[self.lookup], self.known)

    def apply(self, ids: np.ndarray) -> np.ndarray:
        """Raw ids [H, W] uint8 or uint16 -> train ids [H, W] uint8."""
        return np.take(self.lookup[:256] if ids.dtype == np.uint8 else self.lookup, ids)

    def key(self) -> bytes:
        """Equal for tables that map alike: part of the name of a cached label."""
        return self.lookup.tobytes()

    def unknown(self, ids: np.ndarray) -> dict[int, int]:
        """Pixels by id, for ids that are not known to belong to this data set."""
        counts = np.bincount(ids.ravel(), minlength=256)
        return {int(k): int(counts[k]) for k in np.flatnonzero(counts) if not self.known[k]}


def read_classes(path: Path) -> tuple[ClassSet, dict[str, dict[int, int]]]:
    """A classes JSON {"names", "palette", "ignore_index", "from": {key: {id: new}}} -> the classes and the tables of "from" (may be empty).

    "names" and "palette" are lists, or objects by id without a gap; "void" is for `read_label_colours`. Other keys describe the data set
    and are not read; one that looks like a misspelt key is refused. Raises DataError where the file is missing, is no JSON, says something
    twice or contradicts itself.
    """
    if not path.is_file():
        raise DataError(
            f'classes file {path} does not exist. Expected a JSON with "names" and "palette"; see docs/data.md.'
        )
    return _read(path, _parsed)


def read_label_colours(path: Path) -> tuple[tuple[tuple[int, int, int], int], ...]:
    """(colour, class) of a classes JSON that has a "palette" of its own, and (colour, 255) for those in its list "void"; empty without one.

    Raises DataError as `read_classes` does.
    """
    return _read(path, _label_colours)


def _read(path: Path, parse: Callable[[Any], Parsed]) -> Parsed:
    try:
        return parse(json.loads(read_text(path), object_pairs_hook=_once))
    except RecursionError as error:
        raise DataError(f"classes file {path} cannot be used: its brackets are too deep.") from error
    except (OSError, ValueError) as error:  # a JSON or UTF-8 error is a ValueError, too
        raise DataError(
            f"classes file {path} cannot be used: {str(error).rstrip('.?')}. "
            'Expected {"names": [..], "palette": [[r, g, b], ..]}; see docs/data.md.'
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key given twice all but the last value would be lost silently."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice")
        found[key] = value
    return found


def _parsed(content: Any) -> tuple[ClassSet, dict[str, dict[int, int]]]:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    _check_keys(content)
    given = _by_id(content.get("names"), "names")
    odd = next((name for name in given if not isinstance(name, str) or not name.strip()), None)
    if odd is not None or None in given:
        raise ValueError(f"a name is no text, or empty ({odd!r})")
    names = tuple(" ".join(name.split()) for name in given)  # line ends and spaces of a file that was cut into names
    if not 2 <= len(names) <= 255:
        raise ValueError(f"{len(names)} names; between 2 and 255 classes are supported")
    if len(set(names)) < len(names):  # scores are by name: one of the two would be lost
        raise ValueError(f"two classes are called {next(name for name in names if names.count(name) > 1)!r}")
    if content.get("ignore_index", IGNORE) != IGNORE:
        raise ValueError(
            f"ignore_index is {content['ignore_index']}, but only 255 is supported. Store void pixels as 255"
        )
    tables = content.get("from", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ValueError('"from" is no object of tables {key: {old id: new id}}')
    palette = _palette(content["palette"], len(names)) if content.get("palette") else spread_palette(len(names))
    return ClassSet(names, palette), {key: _table(key, table, len(names)) for key, table in tables.items()}


_KEYS = ("names", "palette", "ignore_index", "from", "void")
_OTHERS_WORDS = {"colors": "palette", "colours": "palette", "ignore_label": "ignore_index", "labels": "names"}


def _check_keys(content: dict[str, Any]) -> None:
    for key in content:
        close = difflib.get_close_matches(key.lower(), _KEYS, n=1, cutoff=0.75)
        meant = _OTHERS_WORDS.get(key.lower()) or next(iter(close), None)
        if key not in _KEYS and meant is not None and meant not in content:
            raise ValueError(f"the key {key!r} is unknown; did you mean {meant!r}?")


def _by_id(value: Any, what: str) -> list[Any]:
    """A list, or the values of an object whose keys are the ids 0, 1, 2, ... in any order."""
    if isinstance(value, dict):
        by_id = {_id(key, what): item for key, item in value.items()}
        if len(by_id) < len(value) or sorted(by_id) != list(range(len(value))):
            raise ValueError(f'the ids of "{what}" are {", ".join(value)}; expected each of 0 to {len(value) - 1} once')
        return [by_id[k] for k in range(len(by_id))]
    if not isinstance(value, list):
        raise ValueError(
            f'"{what}" is missing' if value is None else f'"{what}" is a {type(value).__name__}, not a list'
        )
    return value


def _id(value: Any, where: str) -> int:
    """A whole number, or its digits as the key of an object."""
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f'"{where}" holds {value!r} where a whole number is expected')


def _palette(value: Any, count: int) -> tuple[tuple[int, int, int], ...]:
    colours = _by_id(value, "palette")
    whole = all(isinstance(colour, list) and len(colour) == 3 for colour in colours)
    if (
        len(colours) != count
        or not whole
        or any(not 0 <= _id(c, "palette") <= 255 for colour in colours for c in colour)
    ):
        raise ValueError(f"{len(colours)} colours for {count} names; expected one [r, g, b] of 0-255 per name")
    return tuple((int(r), int(g), int(b)) for r, g, b in colours)


def _table(key: str, table: dict[str, Any], count: int) -> dict[int, int]:
    where = f"from -> {key}"
    found: dict[int, int] = {}
    for old, new in ((_id(old, where), _id(new, where)) for old, new in table.items()):
        if old in found:
            raise ValueError(f'"{where}" maps {old} twice')
        if not (0 <= old < _FULL and (0 <= new < count or new == IGNORE)):
            raise ValueError(
                f'"{where}" maps {old} to {new}; expected an id of 0-65535 to a class of 0-{count - 1} or 255'
            )
        found[old] = new
    return found


def _label_colours(content: Any) -> tuple[tuple[tuple[int, int, int], int], ...]:
    classes, _ = _parsed(content)
    if not content.get("palette"):
        return ()
    void = content.get("void", [])
    if not isinstance(void, list):
        raise ValueError('"void" is no list of colours [r, g, b]')
    named = ((colour, k) for k, colour in enumerate(classes.palette))
    return (*named, *((colour, IGNORE) for colour in _palette(void, len(void))))


def spread_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Distinct colours for classes that came without any: the bit-reversal palette of the VOC tools, black left out."""
    colours = []
    for index in range(1, count + 1):
        r = g = b = 0
        for bit in range(8):
            r |= ((index >> (3 * bit)) & 1) << (7 - bit)
            g |= ((index >> (3 * bit + 1)) & 1) << (7 - bit)
            b |= ((index >> (3 * bit + 2)) & 1) << (7 - bit)
        colours.append((r, g, b))
    return tuple(colours)
