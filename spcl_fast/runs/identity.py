"""What makes two runs of a stage the same: its settings and inputs, flat, comparable and hashed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from .. import catalog
from ..config import Config


def settings_sha256(settings: Mapping[str, Any]) -> str:
    """One hash of a flat dict of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def flat_settings(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings (dataclasses, dicts, tuples, paths) as one flat dict `a.b.c -> JSON value`, to compare and to name what differs."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items: Iterable[tuple[str, Any]] = (
            (f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()
        )
        return {key: leaf for name, item in items for key, leaf in flat_settings(item, name).items()}
    if isinstance(value, list | tuple):
        return {prefix: [leaf for item in value for leaf in flat_settings(item, "_").values()]}
    return {prefix: value if value is None or isinstance(value, bool | int | float | str) else str(value)}


CONTENT = "content"  # of an identity: path setting -> what lies there
INPUTS = "inputs"  # of an identity: earlier stage -> hash of its settings
_ABSENT = "(absent)"


def settings_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs, as text: `adapt.lr: 0.1 -> 0.2; seed: 0 -> 1`. Empty if nothing does.

    A setting that the old ones lack counts as its default: a run of a version before that setting did what the default does. A path is
    compared by what lies there where both know it: the same data in another folder are the same.
    """
    old = {**{key: default for key, default in _defaults().items() if key in new}, **old}
    keys = [key for key in {**old, **new} if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    return "; ".join(_words(key, old, new) for key in keys if _counts(key, old, new))


def _counts(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a difference of this key is one: content is compared where both have it, and a path where one lacks it."""
    if key.startswith(f"{CONTENT}."):
        return key in old and key in new
    content = f"{CONTENT}.{key}"
    return content not in old or content not in new


def _words(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    section, _, name = key.partition(".")
    if section == INPUTS and None not in (before := (old.get(key), new.get(key))) and _ABSENT not in before:
        return f"{name} was done again with other settings"
    shown = f"what {name} holds" if section == CONTENT else key
    return f"{shown}: {old.get(key, _ABSENT)!r} -> {new.get(key, _ABSENT)!r}"


@functools.cache
def _defaults() -> dict[str, Any]:
    """By the names that an identity has for them: a stage's own settings stand under its name, whatever its section is called."""
    config = Config()
    stages = {row.name: getattr(config, row.section) for row in (*catalog.STAGES, catalog.HEAD)}
    return flat_settings(config) | flat_settings(stages)


def step_seed(seed: int, stage: str, step: int, rank: int = 0) -> int:
    """Seed of one iteration, in [0, 2**63): a pure function, so that a resumed run needs no stored generator state."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}/{step}/{rank}".encode()).digest()[:8], "little") >> 1
