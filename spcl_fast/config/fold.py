"""What target.fold says: which part of the labelled target images is left out of training, of how many."""

from __future__ import annotations

import re
from typing import NamedTuple

FOLD_FORM = "i/n with i from 1 to n and n of 2 or more, such as 1/4: the first of 4 parts"


class Fold(NamedTuple):
    part: int  # from 1 on
    parts: int

    def __str__(self) -> str:
        return f"{self.part}/{self.parts}"


def read_fold(text: str) -> Fold:
    """Raises ValueError where it is not of FOLD_FORM. One fold has one spelling: stages are compared by it."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    fold = Fold(int(found[1]), int(found[2])) if found else None
    if fold is None or fold.parts < 2 or fold.part > fold.parts:
        raise ValueError(FOLD_FORM)
    return fold


def left_out_words(count: int, of: int, fold: str) -> str:
    """Which images a figure is of, for a reader."""
    return f"{count} of the {of} labelled target images, left out of training (fold {fold})"
