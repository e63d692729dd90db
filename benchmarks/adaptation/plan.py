"""A plan: which settings, on which pairs of domains, with which seeds. Every combination is one `Config` of the product.

    seeds: [0, 1, 2]
    pairs:
      generated: {source.dataset: generated_source, target.dataset: generated_target}
    settings:
      contrast: &contrast {preset: demo, adapt.iterations: 65}
      plain: {<<: *contrast, adapt.contrast_weight: 0}

A setting's values go over those of its pair, both over the preset. Dotted names let `<<` take over single values.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from spcl_fast import catalog
from spcl_fast.config import Config
from spcl_fast.config.load import all_settings, dotted, load_config
from spcl_fast.config.rules import check_config
from spcl_fast.errors import ConfigError
from spcl_fast.runs.identity import flat_settings, settings_sha256

RUNS = Path("runs/adaptation")
_KEYS = {"seeds", "pairs", "settings"}
# say where and how, not what
_ELSEWHERE = {
    "name",
    "runs_dir",
    "seed",
    "loop.workers",
    "loop.log_every",
    "loop.checkpoints_kept",
    "loop.resume",
    "loop.device",
}


@dataclass(frozen=True)
class Plan:
    seeds: tuple[int, ...]
    pairs: dict[str, dict[str, Any]]
    settings: dict[str, dict[str, Any]]

    def config(self, pair: str, setting: str, seed: int, runs: Path = RUNS) -> Config:
        """The checked Config; its run folder is named after setting, recipe and seed, so that a changed recipe never meets old stages."""
        values = {**dotted(self.pairs[pair]), **dotted(self.settings[setting])}
        preset = values.pop("preset", None)
        config = load_config(preset, overrides=list({**values, "seed": seed, "runs_dir": str(runs / pair)}.items()))
        config = dataclasses.replace(config, name=f"{setting}-{recipe_sha256(config)[:8]}-{seed}")
        check_config(config)
        return config


def read_plan(path: Path) -> Plan:
    """Raises ConfigError where the file is no plan, or where any of its combinations is no valid Config."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"plan {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or set(content) != _KEYS or not all(content.values()):
        raise ConfigError(f"plan {path}: expected seeds, pairs and settings, none of them empty, and nothing else")
    plan = Plan(tuple(content["seeds"]), content["pairs"], content["settings"])
    for pair in plan.pairs:
        for setting in plan.settings:
            plan.config(pair, setting, plan.seeds[0])
    return plan


def recipe(config: Config) -> dict[str, Any]:
    """What decides a result, flat: every setting but the seed and where this machine's folders are; of a path the last part counts."""
    settings = {key: value for key, value in flat_settings(config).items() if key not in _ELSEWHERE}
    return {
        key: PurePath(value).name if value and all_settings()[key].about.path else value
        for key, value in settings.items()
    }


def whole_recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """What it lacks at the default: a version before that setting did what the default does."""
    return {**recipe(Config()), **settings}


def what_ran(settings: dict[str, Any]) -> dict[str, Any]:
    """The whole recipe without the sections of stages that it does not have."""
    whole = whole_recipe(settings)
    had = {row.section for row in catalog.STAGES if row.name in whole["stages"]}
    idle = {row.section for row in (*catalog.STAGES, catalog.HEAD)} - had
    return {key: value for key, value in whole.items() if key.partition(".")[0] not in idle}


def recipe_sha256(config: Config) -> str:
    return settings_sha256(recipe(config))


def in_order(config: Config) -> list[str]:
    """The stages of a run as the product does them."""
    return [stage for stage in catalog.names(catalog.STAGES) if stage in config.stages]
