"""Predicted peak memory as a table and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import Config
from ..config.values import as_text
from .fitting import GIB, Fitted
from .peak import CATEGORIES, PeakMemory

NOT_COUNTED = "not counted: the CUDA context, cuDNN's workspace, the allocator's gaps (not yet measured on a GPU): leave room for them"


def as_json(found: list[PeakMemory], config: Config, fitted: Fitted | None = None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "settings": {
            "source.size": list(config.source.size),
            "target.size": list(config.target.size),
            **dataclasses.asdict(config.loop),
        },
        "stages": [dataclasses.asdict(p) for p in found],
    }
    return result | ({"flags": fitted.flags, "command_line": fitted.words()} if fitted is not None else {})


def as_table(found: list[PeakMemory], config: Config) -> str:
    """Peak by category, in MiB, and by phase."""
    names = [name for name in CATEGORIES if any(p.categories.get(name, 0) >= 2**20 for p in found)]
    header = ["stage", "peak GiB", *names, "floor", "TFLOP per step"]
    rows = [header]
    for p in found:
        parts = [f"{p.categories.get(name, 0) / 2**20:,.0f}" for name in names]
        rows.append(
            [p.stage, f"{p.peak_bytes / GIB:.2f}", *parts, f"{p.floor_bytes / 2**20:,.0f}", f"{p.flops / 1e12:.2f}"]
        )
    lines = _aligned(rows)
    sizes = f"source {as_text(config.source.size).replace(',', 'x')}, target {as_text(config.target.size).replace(',', 'x')}"
    loop = config.loop
    lines.insert(0, f"{config.model.name}, {sizes}, {loop.precision}; categories at the peak in MiB")
    phases = list(dict.fromkeys(name for p in found for name in p.phases))
    by_phase = [
        [p.stage, *(f"{p.phases[name] / 2**20:,.0f}" if name in p.phases else "-" for name in phases)] for p in found
    ]
    lines += ["", *_aligned([["peak by phase, MiB", *phases], *by_phase])]
    host = max(p.host_bytes for p in found)
    lines += [f"in the host's memory: {host / 2**20:,.0f} MiB"] * bool(host)
    lines += [f"{p.stage}: recomputed segments begin at blocks {as_text(p.cuts)}" for p in found if p.cuts]
    return "\n".join([*lines, *([] if loop.device == "cpu" else [NOT_COUNTED])])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
