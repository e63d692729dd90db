"""Bugs that are all built into one library and taken one at a time."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence

from . import emulated


class Planted:
    """The emulated backend of an op, or of several, with a switch for its bugs.

    header: what every kernel file includes before the places; the switch is there. replace: what is another text in any case.
    bugs: {name: (file, where, what stands there, what stands there wrongly)}; in `where` the place is {}.
    """

    def __init__(
        self,
        *ops: str,
        bugs: Mapping[str, tuple[str, str, str, str]],
        header: str,
        replace: Sequence[tuple[str, str, str]] = (),
    ) -> None:
        switch = f'extern "C" __attribute__((visibility("default"))) inline int planted_bug = 0;\n\n{_NAMESPACE}'
        replace = [*replace, (header, _NAMESPACE, switch)]
        for number, (file, where, right, wrong) in enumerate(bugs.values(), 1):
            switched = f"(planted_bug == {number} ? ({wrong}) : ({right}))"
            replace.append((file, where.replace("{}", right), where.replace("{}", switched)))
        self.backend = emulated.Backend(*ops, replace=tuple(replace))
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
