"""summary.json: what a run's nets are worth, how long they took and how much memory."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

import torch

from .. import catalog
from ..runs import layout
from .context import Context
from .held_out import fold_record


def write_summary(context: Context) -> dict[str, Any]:
    """summary.json from what the stages wrote so far; a net that was not trained or not evaluated is null."""
    run = context.run
    summary: dict[str, Any] = {"classes": list(context.classes.names)}
    trained = catalog.trained()
    for stage in trained:
        assert stage.net is not None  # these train one
        evaluation = run.read_json(layout.of_stage(stage.name, layout.EVALUATION))
        summary[stage.net] = figures_of(evaluation)
    _warn_of_other_figures(context)
    done = {stage.name: run.done(stage.name) or {} for stage in trained}
    summary["gap_closed"] = gap_closed(summary)
    summary["seconds"] = {stage: round(record["seconds"], 1) for stage, record in done.items() if "seconds" in record}
    summary["peak_memory_bytes"] = {
        stage: record["peak_memory_bytes"] for stage, record in done.items() if "peak_memory_bytes" in record
    }
    summary["selection"] = context.config.evaluate.selection
    if context.domains.labelled_target is not None:
        summary[layout.LABELLED_COUNT] = len(context.domains.labelled_target)
    left_out = fold_record(context.domains)
    if left_out is not None:
        summary[layout.LEFT_OUT] = left_out
    summary["seed"] = context.config.seed
    summary["machine"] = machine(context)
    run.write_json(layout.SUMMARY, summary)
    return summary


def figures_of(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of a stage's evaluation.json what a summary says of its net."""
    return None if evaluation is None else {key: evaluation[key] for key in ("miou", "iou", "predicted_share")}


def _warn_of_other_figures(context: Context) -> None:
    """A stage done later, by itself, may have been evaluated otherwise than those before it."""
    ways: dict[str, list[str]] = {}
    for stage in catalog.trained():
        evaluation = context.run.read_json(layout.of_stage(stage.name, layout.EVALUATION)) or {}
        if layout.EVALUATED in evaluation:
            ways.setdefault(json.dumps(evaluation[layout.EVALUATED], sort_keys=True), []).append(stage.name)
    if len(ways) > 1:
        groups = " and ".join(", ".join(stages) for stages in ways.values())
        context.run.say(
            f"warning: {groups} were evaluated on other images or with other settings of evaluate: their figures do not compare. "
            "`spcl-fast run` with all of these stages evaluates them alike."
        )


def gap_closed(nets: Mapping[str, Any]) -> float | None:
    """How much of the way from the baseline to the oracle the last adapted net goes, 1: all of it; None without any of the three."""

    def last(role: str) -> Any:
        found = [nets.get(stage.net) for stage in catalog.with_role(role) if stage.net is not None]
        return next((net for net in reversed(found) if net), None)

    final, source, oracle = last("result"), last("baseline"), last("bound")
    if not (final and source and oracle) or None in (final["miou"], source["miou"], oracle["miou"]):
        return None
    if oracle["miou"] == source["miou"]:
        return None
    return (final["miou"] - source["miou"]) / (oracle["miou"] - source["miou"])


def machine(context: Context) -> dict[str, Any]:
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else _processor()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
