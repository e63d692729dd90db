"""The lines that are printed, and benchmarks/results/cpu_ops.json: the ops, and under "instructions" those of a lower instruction set."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from benchmarks import RESULTS
from benchmarks.machine import describe_cpu

SAVED = RESULTS / "cpu_ops.json"


def with_ratios(entry: dict, ours: str) -> dict:
    """How many times faster ours is than each peer, by medians, and the share of the floor."""
    mine = entry["times"].get(ours)
    if mine is None:
        return entry
    peers = {peer: stats for peer, stats in entry["times"].items() if peer != ours}
    entry["times_faster_than"] = {
        peer: round(stats["median_ms"] / mine["median_ms"], 2) for peer, stats in peers.items()
    }
    entry["share_of_floor"] = round(entry["floor"]["ms"] / mine["median_ms"], 3)
    return entry


def lines(op: str, shape: str, entry: dict) -> list[str]:
    found = [f"{op} {shape} {entry['shape']}: milliseconds, median (min, interquartile range)"]
    for peer, t in entry["times"].items():
        faster = entry.get("times_faster_than", {}).get(peer)
        line = f"  {peer:<32}{t['median_ms']:>10.2f}  ({t['min_ms']:.2f}, {t['iqr_ms']:.2f})"
        found.append(line + (f"   spcl_fast is {faster} x as fast" if faster else ""))
    if "share_of_floor" in entry:
        floor = entry["floor"]
        found.append(f"  floor {floor['ms']:.2f} ms = {floor['is']}; share of floor {entry['share_of_floor']}")
    if not entry["times"]:
        found.append(f"  checked: {', '.join(entry['checked'])}")
    return [*found, *(f"  {peer} was skipped: {reason}" for peer, reason in entry["skipped"].items())]


def baseline_line(op: str, shape: str, ratio: Mapping) -> str:
    return (
        f"{op:<28}{shape:<5}{ratio['before_ms']:>9.2f} ms before {ratio['now_ms']:>9.2f} ms now   {ratio['times_as_fast']:.2f} x as fast "
        f"(quartiles {ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f})"
    )


def save(found: Mapping[str, Mapping], threads: int) -> None:
    """Replaces what was measured, of the instruction set that was asked for."""
    result = _read()
    part = _part(result)
    part["machine"] = describe_cpu(threads)
    for op, shapes in found.items():
        dated = {shape: entry | {"date": part["machine"]["date"]} for shape, entry in shapes.items()}
        part.setdefault("ops", {}).setdefault(op, {}).update(dated)
    _write(result)


def save_baseline(revision: str, found: Mapping[str, Mapping], threads: int) -> None:
    result = _read()
    part = _part(result).setdefault("baseline", {})
    if part.get("revision") != revision:
        part.clear()
    part |= {"revision": revision, "machine": describe_cpu(threads)}
    for op, shapes in found.items():
        part.setdefault("ops", {}).setdefault(op, {}).update(shapes)
    _write(result)


def _part(result: dict) -> dict:
    level = os.environ.get("SPCL_FAST_CPU_CAPABILITY")
    return result.setdefault("instructions", {}).setdefault(level, {}) if level else result


def _read() -> dict:
    return json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {}


def _write(result: dict) -> None:
    SAVED.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
