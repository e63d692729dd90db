"""The memory ledger: measured peak of each phase of a step next to what was planned, and which settings of the loop were on."""

from __future__ import annotations

from typing import Any

from .. import catalog
from ..config import SAVES_MEMORY, LoopConfig
from ..runs.layout import PHASES
from ..runs.reading import RunFolder, number


def ledger(run: RunFolder) -> dict[str, Any]:
    """Rows by stage, for stages whose log has a plan or phases."""
    found = {}
    for stage, records in run.metrics.items():
        found[stage] = (_last(records, "phase_peak_bytes"), _last(records, "predicted_peak_bytes"), records)
    found = {
        stage: parts for stage, parts in found.items() if isinstance(parts[0], dict) or number(parts[1]) is not None
    }
    phases = [
        name for name in PHASES if any(isinstance(parts[0], dict) and name in parts[0] for parts in found.values())
    ]
    rows = []
    for stage, (by_phase, planned, records) in found.items():
        by_phase = by_phase if isinstance(by_phase, dict) else {}
        rows.append(
            {
                "name": catalog.title(stage),
                "phases": [mebibytes(by_phase.get(name)) for name in phases],
                "peak": mebibytes(
                    max((number(record.get("peak_memory_bytes")) or 0 for record in records), default=None)
                ),
                "planned": mebibytes(planned),
                "saved": ", ".join(_saved(run, name, by) for name, by in run.saved_bytes.get(stage, {}).items()),
            }
        )
    return {"phases": phases, "rows": rows, "saves": any(row["saved"] for row in rows), "note": _note(run)}


def _note(run: RunFolder) -> str:
    settings = {name: run.setting("loop", name) for name in SAVES_MEMORY}
    off = LoopConfig()
    on = [f"{name} {value}" for name, value in settings.items() if value not in (None, getattr(off, name))]
    text = f"Settings that save memory: {', '.join(on)}. " if on else "No setting that saves memory was on. "
    return (
        text
        + "On a GPU the measured bytes are those that torch allocated; on the CPU they are the whole process's, interpreter and "
        "libraries included, while the plan counts tensors and oneDNN's copies. Saved: what the planned peak would rise by without that "
        "setting alone."
    )


def _last(records: list[dict[str, Any]], key: str) -> Any:
    return next((record[key] for record in reversed(records) if key in record), None)


def _saved(run: RunFolder, setting: str, by: float) -> str:
    amount = mebibytes(by) if by >= 0 else f"costs {mebibytes(-by)}"
    return f"{setting} {run.setting('loop', setting)}: {amount}"


def mebibytes(value: Any) -> str:
    size = number(value)
    return "–" if not size else f"{size / 2**20:,.0f} MiB"
