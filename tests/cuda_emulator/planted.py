"""Bugs that are all built into one library and taken one at a time."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping

from . import emulated


class Planted:
    """The emulated backend of an op with a switch for its bugs.

    bugs: {name: (file, where, what stands there, what stands there wrongly)}; in `where` the place is {}.
    """

    def __init__(self, op: str, bugs: Mapping[str, tuple[str, str, str, str]], header: str = "contrast_plan.h") -> None:
        switch = f'extern "C" __attribute__((visibility("default"))) inline int planted_bug = 0;\n\n{_NAMESPACE}'
        replace = [(header, _NAMESPACE, switch)]
        for number, (file, where, right, wrong) in enumerate(bugs.values(), 1):
            switched = f"(planted_bug == {number} ? ({wrong}) : ({right}))"
            replace.append((file, where.replace("{}", right), where.replace("{}", switched)))
        self.backend = emulated.Backend(op, replace=tuple(replace))
        self._names = list(bugs)
        self._taken = ctypes.c_int.in_dll(self.backend.handle, "planted_bug")

    @contextlib.contextmanager
    def bug(self, name: str) -> Iterator[None]:
        self._taken.value = self._names.index(name) + 1
        try:
            yield
        finally:
            self._taken.value = 0


_NAMESPACE = "namespace spcl::gpu {"
