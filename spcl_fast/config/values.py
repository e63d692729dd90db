"""One value of one setting: from text, YAML or Python to its type, and back to text. A shell, a file and a plan are read alike."""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .. import catalog
from .schema import About

_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_WHOLE, _FLOAT = (
    re.compile(r"[+-]?\d+(_\d+)*"),
    re.compile(r"\.(?=nan|inf)", re.IGNORECASE),
)  # YAML writes .nan and -.inf


class Setting(NamedTuple):
    """A setting of the schema."""

    hint: Any  # its type
    default: Any
    about: About

    @property
    def choices(self) -> tuple[str, ...]:
        """What it may be, where that is a list of names."""
        literal = next((typing.get_args(part) for part in options(self.hint) if _origin(part) is typing.Literal), ())
        return self.about.choices or literal

    def read(self, value: Any) -> Any:
        """`value` as the type of the setting. Raises ValueError that says what was expected."""
        try:
            found = _read(value, self.hint)
        except ValueError:
            raise ValueError(self.expected()) from None
        for item in _items(found):
            if self._refuses(item):
                raise ValueError(f"{self.expected()}{_near(str(item), self.choices)}")
        return os.path.expanduser(found) if self.about.path and isinstance(found, str) else found

    def expected(self) -> str:
        """What `read` takes, for an error."""
        if self.choices:
            many = any(_origin(part) is tuple for part in options(self.hint))
            return ("a list of: " if many else "one of ") + ", ".join(self.choices)
        return " or ".join(_expected(part) for part in options(self.hint))

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value of the right type, as "got .., expected ..", or None."""
        for item in _items(value):
            if self._refuses(item):
                return f"got {item!r}, expected {self.expected()}{_near(str(item), self.choices)}"
            if isinstance(item, float) and not math.isfinite(item):
                return f"got {as_text(value)}, expected a finite number"
            if isinstance(item, int | float) and not isinstance(item, bool) and not self._within(item):
                return f"got {as_text(value)}, expected {self._range()}"
        return None

    def _refuses(self, item: Any) -> bool:
        return bool(self.choices) and item is not None and not catalog.offers(self.choices, str(item))

    def _within(self, item: float) -> bool:
        about = self.about
        return (
            (about.above is None or item > about.above)
            and (about.least is None or item >= about.least)
            and (about.most is None or item <= about.most)
        )

    def _range(self) -> str:
        above, least, most = self.about.above, self.about.least, self.about.most
        words = "" if least is None else f"of {least:g} or more"
        words = words if above is None else f"above {above:g}"
        if most is not None:
            words = f"from {least:g} to {most:g}" if least is not None else f"{words} and at most {most:g}".strip()
        hint = next(part for part in options(self.hint) if part is not type(None))
        if _origin(hint) is tuple:
            whole = typing.get_args(hint)[0] is int
            return f"width and height {words}, such as 1280,720" if whole else f"two numbers {words}, such as 0.5,1.5"
        return f"{_NOUNS[hint]} {words}"


def _near(name: str, among: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(among), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def options(hint: Any) -> tuple[Any, ...]:
    """The parts of a union, or the type alone."""
    union = isinstance(hint, types.UnionType) or _origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint)


def _items(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, tuple) else (value,)


def _expected(hint: Any) -> str:
    if _origin(hint) is tuple:
        parts = typing.get_args(hint)
        if Ellipsis in parts:
            return "a list such as [a, b]"
        return "two whole numbers such as 1280,720" if parts[0] is int else "two numbers such as 0.5,1.5"
    return _NOUNS[hint]


# ---- reading -----------------------------------------------------------------------------------------------------------


def _read(value: Any, hint: Any) -> Any:
    """Raises ValueError where `value` is not of the type; null only where the type has it."""
    parts = options(hint)
    if type(None) in parts and (value is None or value == "null"):
        return None
    part = next(part for part in parts if part is not type(None))
    return _READERS[_origin(part) or part](value, part)


def _int(value: Any, hint: Any) -> int:
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError


def _float(value: Any, hint: Any) -> float:
    if isinstance(value, str):
        return float(_FLOAT.sub("", value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ValueError


def _bool(value: Any, hint: Any) -> bool:
    found = _TRUTH.get(value.strip().lower()) if isinstance(value, str) else value
    if isinstance(found, bool):
        return found
    raise ValueError


def _str(value: Any, hint: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError


def _tuple(value: Any, hint: Any) -> tuple:
    """A list, or its items in text with or without brackets: 1280x720, 0.5,1.5, [warmup, adapt]."""
    parts = typing.get_args(hint)
    if isinstance(value, str):
        text = value.strip()
        text = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        separator = r"," if parts[0] is str else r"[x×,]"
        value = [item.strip() for item in re.split(separator, text) if item.strip()]
    if not isinstance(value, list | tuple) or (Ellipsis not in parts and len(value) != len(parts)):
        raise ValueError
    return tuple(_read(item, parts[0]) for item in value)


_READERS = {int: _int, float: _float, bool: _bool, str: _str, tuple: _tuple, typing.Literal: _str}


# ---- back to text -------------------------------------------------------------------------------------------------------


def as_text(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)


def plain(value: Any) -> Any:
    """Nested settings with lists for tuples, as YAML writes them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value
