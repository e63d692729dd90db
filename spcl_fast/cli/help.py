"""The settings of a command, as its help lists them: by section, those that the trained stages share once."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .. import catalog
from ..config import Config
from ..config.load import all_settings, dotted
from ..config.values import Setting, as_text

_WIDTH, _NAME = 140, 48


def settings_help(sections: tuple[str, ...], shown: Config | None = None) -> str:
    """One line or two per setting. shown: the settings whose values stand in brackets; None: the package's own."""
    values = dotted(dataclasses.asdict(Config() if shown is None else shown))
    whose = (
        "default of the package in brackets, presets change it" if shown is None else "in brackets: value of the preset"
    )
    stages = [name for name in sections if name in {stage.section for stage in catalog.trained()}]
    lines = ["", f"settings (--name value; {whose}):", *_lines(_plain("", values))]
    for name in sections:
        if name not in stages or len(stages) == 1:
            lines += ["", f"{name}:", *_lines(_plain(name, values))]
    if len(stages) > 1:
        lines += ["", f"STAGE, one of {', '.join(stages)} (--iterations N, --batch_size N: of every stage):"]
        lines += _lines(_shared(stages, values))
        for name in stages:
            own = _lines(_own(name, stages, values))
            lines += ["", f"{name} alone:", *own] if own else []
    return "\n".join(lines)


def _plain(section: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str, Setting]]:
    for key, setting in all_settings().items():
        if key.partition(".")[0] == section if section else "." not in key:
            yield key, as_text(values[key]), setting


def _shared(stages: list[str], values: Mapping[str, Any]) -> Iterator[tuple[str, str, Setting]]:
    """What more than one stage has, under the name STAGE: the value of most, and of those that have another."""
    for leaf, having in _holders(stages).items():
        if len(having) > 1:
            found = {stage: as_text(values[f"{stage}.{leaf}"]) for stage in having}
            most = Counter(found.values()).most_common(1)[0][0]
            others = [f"; {stage} {value}" for stage, value in found.items() if value != most]
            yield f"STAGE.{leaf}", most + "".join(others), all_settings()[f"{having[0]}.{leaf}"]


def _own(stage: str, stages: list[str], values: Mapping[str, Any]) -> Iterator[tuple[str, str, Setting]]:
    for leaf, having in _holders(stages).items():
        if having == [stage]:
            key = f"{stage}.{leaf}"
            yield key, as_text(values[key]), all_settings()[key]


def _holders(stages: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in all_settings():
        section, _, leaf = key.partition(".")
        if section in stages:
            found.setdefault(leaf, []).append(section)
    return found


def _lines(entries: Iterator[tuple[str, str, Setting]]) -> list[str]:
    lines = []
    for key, value, setting in entries:
        text = "; ".join(filter(None, [setting.about.help, " | ".join(setting.choices)]))
        name = f"  --{key} [{value}]".ljust(_NAME)
        lines += textwrap.wrap(
            f"{name} {text}", _WIDTH, subsequent_indent=" " * (_NAME + 1), break_on_hyphens=False
        ) or [name]
    return lines
