"""Decoded pictures kept in RAM up to a byte budget shared by all data sets of the process.

Keys name content (a file with its time and size, or a generated scene), so a data set that is built again for the next stage finds what
the last one decoded. When the budget is full a random entry makes room: with shuffled epochs that keeps more hits than dropping the oldest.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DEFAULT_BYTES = 512 << 20


def file_key(path: Path) -> Hashable:
    """Changes when the file does."""
    state = os.stat(path)
    return (str(path), state.st_mtime_ns, state.st_size)


def size_bytes(value: Image.Image | np.ndarray) -> int:
    return (
        value.nbytes if isinstance(value, np.ndarray) else value.width * value.height * 4
    )  # Pillow stores RGB in 4 bytes


class ContentCache:
    """A bounded dictionary of pictures; safe to use from several threads. Values are shared: never write into one."""

    def __init__(self, budget_bytes: int = DEFAULT_BYTES):
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._values: dict[Hashable, Any] = {}
        self._order: list[Hashable] = []
        self._lock = threading.Lock()
        self._random = random.Random(0)  # what is dropped changes the speed only, never a batch

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            value = self._values.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def put(self, key: Hashable, value: Any) -> None:
        size = size_bytes(value)
        if size > self.budget_bytes:
            return
        with self._lock:
            if key in self._values:
                return
            self._shrink(self.budget_bytes - size)
            self._values[key] = value
            self._order.append(key)
            self.used_bytes += size

    def set_budget(self, budget_bytes: int) -> None:
        with self._lock:
            self.budget_bytes = budget_bytes
            self._shrink(budget_bytes)

    def clear(self) -> None:
        with self._lock:
            self._shrink(0)

    def _shrink(self, to_bytes: int) -> None:
        while self.used_bytes > to_bytes and self._order:
            index = self._random.randrange(len(self._order))
            self._order[index], self._order[-1] = self._order[-1], self._order[index]
            self.used_bytes -= size_bytes(self._values.pop(self._order.pop()))


CACHE = ContentCache()


def _renew_lock_after_fork() -> None:
    CACHE._lock = threading.Lock()  # a thread of the parent may have held it at the moment of the fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock_after_fork)
