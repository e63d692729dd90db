"""One seed of one pair: the settings of a plan one after another, each ending in one line of results."""

from __future__ import annotations

import datetime
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.adaptation.lines import add_line, latest
from benchmarks.adaptation.plan import RUNS, Plan, in_order, recipe, recipe_sha256, what_ran
from benchmarks.adaptation.sharing import take_over
from benchmarks.adaptation.unlabelled import keep_signals
from spcl_fast import catalog
from spcl_fast.config import Config
from spcl_fast.memory_plan.peak import forecast
from spcl_fast.method.context import Context
from spcl_fast.method.run import run_stages
from spcl_fast.runs import layout

NETS = {row.name: row.net for row in catalog.trained()}


def run_seed(plan: Plan, pair: str, seed: int, results: Path, runs: Path = RUNS) -> None:
    """Every setting that has no line yet. Raises what a stage raises; what was finished before stays."""
    for setting in plan.settings:
        config = plan.config(pair, setting, seed, runs)
        file = results / f"{pair}.jsonl"
        line = latest(file).get((setting, seed))
        if line is not None and what_ran(line["settings"]) == what_ran(recipe(config)):
            print(f"{pair} {setting} {seed}: has its line", flush=True)
            continue
        run_setting(config)
        add_line(file, {"pair": pair, "setting": setting, **line_of(config)})


def run_setting(config: Config) -> None:
    """All stages of one run, or what is left of them; the signals of each net next to it."""
    for stage in in_order(config):
        donor = take_over(stage, config)
        if donor is not None:
            print(f"{stage}: taken over from {donor.name}", flush=True)
        run_stages(config, [stage], forecast=forecast)
        if stage in NETS:
            keep_signals(Context(config), stage)


def line_of(config: Config) -> dict[str, Any]:
    """What a finished run has to say, all of it from its folder."""
    run = Context(config).run
    summary = run.read_json(layout.SUMMARY)
    trained = [stage for stage in in_order(config) if stage in NETS]
    return {
        "seed": config.seed,
        "settings_sha256": recipe_sha256(config),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"spcl_fast": importlib.metadata.version("spcl_fast"), "commit": commit(), **summary["machine"]},
        "nets": {
            NETS[stage]: {**summary[NETS[stage]], "signals": run.read_json(f"{stage}/signals.json")}
            for stage in trained
        },
        "pseudo_labels": {
            stage: _kept(record)
            for stage in in_order(config)
            if (record := run.read_json(layout.of_stage(stage, layout.THRESHOLDS))) is not None
        },
        "seconds": summary["seconds"],
        "settings": recipe(config),
    }


def _kept(record: dict[str, Any]) -> dict[str, Any]:
    """The share of predicted pixels above their threshold; a class that was never predicted has none."""
    predicted, kept = record["predicted_pixels"], record["kept_pixels"]
    by_class = {name: kept[name] / count if count else None for name, count in predicted.items()}
    return {
        "kept_share": sum(kept.values()) / max(sum(predicted.values()), 1),
        "by_class": by_class,
        "thresholds": record["thresholds"],
    }


def commit() -> str | None:
    """Of this checkout, with a + where tracked files differ from it; None where there is no git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
