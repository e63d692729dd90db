"""What the counts say of a row that `make gpu` times: bytes, limiter, and the time that they allow at the run's own copy speed.

A prediction is a least time: the bytes that must move over the copy speed of this run, over the share of it that the verdict of
docs/gpu-evidence.md allows. `disagreements` names the rows whose time is more than 15 % from it: the verdict is then wrong, or the kernel
is held up by what was not counted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable

from benchmarks import RESULTS
from benchmarks.gpu.where import backend_of
from benchmarks.traffic import works
from benchmarks.traffic.machines import A100, H200, Machine

MOST_APART = 0.15
OPS = {  # a timed row's name -> the counted op, and its passes
    "contrast forward": ("prototype_contrastive_loss", ("forward",)),
    "contrast forward + backward": ("prototype_contrastive_loss", ("forward", "backward")),
    "class_moments": ("class_moments", ("forward",)),
    "upsampled_cross_entropy with gradient": ("upsampled_cross_entropy", ("forward",)),
    "upsampled_prediction": ("upsampled_prediction", ("forward",)),
}
_DTYPES = {"float32": "float32", "bfloat16": "half", "float16": "half"}
_LEAST = {"forward": 1.0, "backward": 2.0}  # S


@functools.cache
def _counted() -> dict[tuple[str, str], dict]:
    path = RESULTS / "traffic.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {(row["case"], row["by"]): row for row in rows}


def machine_of(capability: str) -> Machine:
    """The described GPU that is nearest to one of this compute capability ("9.0")."""
    return A100 if capability.startswith("8") else H200


def predicted(op: str, shape: str, dtype: str, backend: str, copy_gb_s: float, machine: Machine) -> dict:
    """predicted_bytes (of DRAM), limiter, predicted_us; {} where nothing was counted for the row."""
    name, phases = OPS.get(op, ("", ()))
    layout = "odd" if shape == "A" else "even"
    row = _counted().get((f"{name}, {shape}, {_DTYPES.get(dtype)}, {layout}", backend))
    if row is None:
        return {}
    problem, verdicts = works.Problem.of(row["case"]), works.verdicts(row, machine)
    bytes_, took = 0.0, {}
    for phase in phases:
        moved = sum(work.dram_bytes for work in works.works(row, phase, machine))
        least = _LEAST[phase] * problem.unit_bytes if problem.is_map else moved
        bytes_ += moved
        took[phase] = least / verdicts[phase].share / copy_gb_s / 1e3
    limiter = verdicts[max(took, key=lambda phase: took[phase])].limiter
    return {"predicted_bytes": round(bytes_), "limiter": limiter, "predicted_us": round(sum(took.values()), 1)}


def compared(best_us: float, found: dict) -> dict:
    """What is added to a timed row; found: what `predicted` gave."""
    return found | {"measured_over_predicted": round(best_us / found["predicted_us"], 2)} if found else {}


def _rows(parts: dict) -> Iterable[tuple[str, dict]]:
    for name, part in parts.items():
        for row in part.get("rows", []):
            if isinstance(row, dict) and "measured_over_predicted" in row:
                yield backend_of(name), row


def disagreements(parts: dict) -> list[str]:
    """A line for each row that is more than MOST_APART from its prediction."""
    return [
        f"{by}, {row['op']}, {row['shape']}, {row['dtype']}: {row['measured_over_predicted']:.2f} of the predicted time ({row['limiter']})"
        for by, row in _rows(parts)
        if abs(row["measured_over_predicted"] - 1) > MOST_APART
    ]


def table(parts: dict) -> str:
    """Measured next to predicted, a line per row, then what disagrees."""
    lines = [f"{'':64} {'measured us':>12} {'predicted us':>13} {'predicted MB':>13}  limiter"]
    for by, row in _rows(parts):
        title = f"{by}, {row['op']}, {row['shape']}, {row['dtype']}"
        best = row["predicted_us"] * row["measured_over_predicted"]
        lines.append(
            f"{title:64} {best:12.1f} {row['predicted_us']:13.1f} {row['predicted_bytes'] / 1e6:13.1f}  {row['limiter']}"
        )
    late = disagreements(parts)
    count = len(lines) - 1
    lines.append(f"{len(late)} of {count} rows are more than {MOST_APART:.0%} from what the counts predict")
    return "\n".join([*lines, *late]) if count else ""
