"""The released code's `*_label_info.p`: which image holds which class, so that balanced sampling need not read every label again.

A pickle can run code, so it is read by an unpickler that resolves no names: lists, dictionaries, strings and numbers pass, all else fails.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import DataError


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, and only lists, dictionaries, strings and numbers are allowed"
        )

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside of the file")


def read_label_info(path: Path) -> dict[str, list[int]]:
    """Image name without suffix -> the train ids it holds. Raises DataError for a file that is no such pickle or wants to run code."""
    try:
        with open(path, "rb") as file:
            content = _PlainUnpickler(file).load()
        _, file_to_label = content
        return {str(file).rsplit(".", 1)[0]: [int(k) for k in labels] for file, labels in file_to_label.items()}
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"label info {path} cannot be used: {error}. Expected the pair (label_to_file, file_to_label) of the released SPCL scripts. "
            "Remove the file to have the labels counted instead."
        ) from error


def presence_from_info(path: Path, names: list[str], num_classes: int) -> np.ndarray | None:
    """bool [images, K]; None where the file does not know every image, or knows more classes: then it belongs to other data."""
    info = read_label_info(path)
    if any(name not in info for name in names):
        return None
    presence = np.zeros((len(names), num_classes), bool)
    for row, name in zip(presence, names, strict=True):
        if any(not 0 <= k < num_classes for k in info[name]):
            return None
        row[info[name]] = True
    return presence
