"""Stages that settings have in common are done once: a finished one is copied from another run of the same pair and seed.

Which stages those are follows from the two Configs alone. The product has the last word: it refuses a stage whose record is not its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spcl_fast import catalog
from spcl_fast.config import Config
from spcl_fast.runs import layout
from spcl_fast.runs.folder import Run
from spcl_fast.runs.identity import flat_settings, settings_difference

_COMMON = (
    "source",
    "target",
    "model",
    "evaluate",
    "seed",
    "loop.precision",
    "loop.channels_last",
    "loop.checkpoint_every",
)


def inputs(stage: catalog.Stage, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The stages whose results `stage` starts from in a run with these flat settings."""
    return catalog.inputs(stage, lambda name: name in settings["stages"], settings.get)


def depends_on(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's flat settings those that the result of `stage` depends on, through the stages before it too."""
    sections, waiting, few_labels = {*_COMMON}, [stage], False
    while waiting:
        row = catalog.find(catalog.STAGES, waiting.pop())
        sections.add(row.section)
        few_labels |= catalog.depends_on_labelled(row, settings.get("target.fold"))
        waiting.extend(inputs(row, settings))
    return {
        key: value
        for key, value in settings.items()
        if any(key == name or key.startswith(f"{name}.") for name in sections)
        and (few_labels or key not in ("target.labelled", "target.fold"))
    }


def take_over(stage: str, config: Config) -> Path | None:
    """Copy a finished `stage` of the same settings from a run next to this one, whole or not at all. -> the run it came from."""
    run = Run(Path(config.runs_dir) / config.name)
    if run.path(stage).exists():  # done, or under way: the product goes on with it
        return None
    wanted = depends_on(stage, flat_settings(config))
    for file in sorted(Path(config.runs_dir).glob(f"*/{layout.CONFIG}")):
        donor = Run(file.parent)
        if donor.done(stage) is None or settings_difference(depends_on(stage, _settings_in(file)), wanted):
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        outside = f"{stage}.safetensors"  # what a stage leaves for others outside of its folder is called after it
        if donor.path(outside).is_file():
            shutil.copyfile(donor.path(outside), run.path(outside))
        copy = run.path(f"{stage}.copying")
        shutil.rmtree(copy, ignore_errors=True)  # of a copy that was cut short
        shutil.copytree(donor.path(stage), copy)
        copy.rename(run.path(stage))
        return donor.folder
    return None


def _settings_in(file: Path) -> dict[str, Any]:
    """What the file does not name, a version before that setting having written it, is at its default."""
    return {**flat_settings(Config()), **flat_settings(yaml.safe_load(file.read_text(encoding="utf-8")))}
