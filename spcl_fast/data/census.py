"""Counts of the labels of a data set, and what they show: unknown ids, classes that never occur, and the likely cause."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .classes import CITYSCAPES_IDS_19, IGNORE, LabelTable
from .dataset import LabelIds
from .left_out import counted

MANY = 20  # unknown ids: more are not a class or two that the list lacks
_LABEL_IDS = range(34)  # Cityscapes'


@dataclass(frozen=True)
class ClassFinding:
    """`kind`: nothing is labelled, one class alone occurs, classes never occur, ids are unknown. `stops`: training on it makes no sense."""

    kind: Literal["nothing", "one", "absent", "unknown"]
    text: str
    stops: bool


@dataclass
class Census:
    """The labels of `counted` of `labels` images."""

    classes: tuple[str, ...]
    table: LabelTable | None  # own ids -> classes; None: the ids are the classes
    labels: int
    counted: int = 0
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE + 1, np.int64))  # by train id [256]
    images_with: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE + 1, np.int64))
    ids: Counter[int] = field(default_factory=Counter)  # pixels by the set's own id
    unknown: Counter[int] = field(default_factory=Counter)  # those of `ids` that the set is not known to hold

    def add(self, label: LabelIds) -> None:
        self.counted += 1
        self.pixels += label.train
        self.images_with += label.train > 0
        self.ids.update(label.own)
        self.unknown.update(label.unknown)

    @property
    def ignored(self) -> int:
        return int(self.pixels[IGNORE])

    def findings(self) -> list[ClassFinding]:
        """Everything that is odd about the labels, the worst first."""
        if not self.counted:
            return []
        count = len(self.classes)
        possible = [True] * count if self.table is None else np.isin(range(count), self.table.lookup).tolist()
        absent = [k for k in range(count) if possible[k] and not self.pixels[k]]
        met, total = int(np.count_nonzero(self.pixels[:count])), int(self.pixels.sum())
        cause = self._cause(absent)
        found = []
        if not met:
            found.append(
                ClassFinding(
                    "nothing", f"no pixel of {self._read()} has a class: {self.ignored / total:.1%} are ignored", True
                )
            )
        elif met == 1 and sum(possible) > 1:
            only = self.classes[int(np.flatnonzero(self.pixels[:count])[0])]
            text = f"{only} is the only class in {self._read()}; {self.ignored / total:.1%} of the pixels are ignored"
            found.append(ClassFinding("one", text, True))
        elif absent:
            found.append(
                ClassFinding(
                    "absent", f"{self._names(absent)} never {self._verb(absent)} in {self._read()}", cause.stops
                )
            )
        if self.unknown:
            most = ", ".join(f"{k} ({counted(n, 'pixel')})" for k, n in sorted(self.unknown.items())[:5])
            more = f" and {len(self.unknown) - 5} more" if len(self.unknown) > 5 else ""
            share = sum(self.unknown.values()) / total
            text = f"unknown ids in {self._read()}, ignored, {share:.1%} of the pixels: {most}{more}"
            found.append(ClassFinding("unknown", text, cause.stops or share > 0.5))
        return [ClassFinding(one.kind, f"{one.text}. {cause.text}", one.stops) for one in found]

    def _read(self) -> str:
        labels = f"{self.counted} label{'' if self.counted == 1 else 's'}"
        return labels if self.counted == self.labels else f"the {labels} looked at (of {self.labels})"

    def _names(self, classes: list[int]) -> str:
        some = ", ".join(self.classes[k] for k in classes[:8])
        return some + (f" and {len(classes) - 8} more classes" if len(classes) > 8 else "")

    @staticmethod
    def _verb(classes: list[int]) -> str:
        return "occurs" if len(classes) == 1 else "occur"

    # --- likely causes ------------------------------------------------------------------------------------------------------

    def _cause(self, absent: list[int]) -> _Cause:
        """What makes labels look so, by the mistakes that people make."""
        count, ids = len(self.classes), {k for k in self.ids if k != IGNORE}
        own = self.table is None or _keeps_ids(self.table, count)
        step = math.gcd(*ids) if max(ids, default=0) >= count else 1
        if own and ids <= {0} and self.ids.get(IGNORE):
            return _Cause(
                "Are these masks of 0 and 255? Here 255 means 'no class'. Save the object as 1, or map it: a `classes` file "
                'with "from": {"<root folder>": {"0": 0, "255": 1}}',
                True,
            )
        if own and self.unknown and step > 1:
            return _Cause(
                f'All ids are multiples of {step}: were they stretched to be seen? Divide them, or map them in "from" of a `classes` file',
                True,
            )
        if own and set(self.unknown) == {count}:
            return _Cause(
                f"Do the ids start at 1? They go up to {count}, and {count} classes are 0 to {count - 1}, so that every name is its "
                f'neighbour\'s. Subtract 1, name what 0 is in classes.json, or map the ids in "from" of a `classes` file '
                f"({count}: 255 if it means no class)",
                True,
            )
        if own and count in (16, 19) and len(self.unknown) > 1 and ids <= set(_LABEL_IDS):
            return _Cause(
                "Are these Cityscapes' label ids (0 to 33) instead of its 19 train ids? Use the *_labelTrainIds files, or map them with "
                '"from" of a `classes` file',
                True,
            )
        if not own and self._looks_like_train_ids(ids, absent):
            return _Cause(
                "Are these train ids (0 to 18) where label ids (0 to 33) are expected? Use the *_labelIds files, or dataset folders",
                True,
            )
        if len(self.unknown) > MANY:
            return _Cause(
                "So many ids come from resizing labels with interpolation, or from JPEG: export them again as PNG",
                False,
            )
        if self.unknown:
            return _Cause('Name them in classes.json, or map them in "from" of a `classes` file (255: no class)', False)
        return _Cause("Check the ids and names in classes.json, or leave out what the data do not have", False)

    def _looks_like_train_ids(self, ids: set[int], absent: list[int]) -> bool:
        assert self.table is not None
        reached = [k for k in CITYSCAPES_IDS_19 if self.table.lookup[k] != IGNORE]
        raw = len(reached) >= 13 and all(self.table.known[k] for k in _LABEL_IDS)
        return raw and len(ids) > 2 and max(ids) < 19 and 2 * len(absent) >= len(self.classes)


@dataclass(frozen=True)
class _Cause:
    text: str
    stops: bool


def _keeps_ids(table: LabelTable, count: int) -> bool:
    return table.lookup[:count].tolist() == list(range(count))
