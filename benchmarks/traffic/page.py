"""docs/gpu-evidence.md from the result file: one table per op, and which rows miss a goal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks import GPU_BACKENDS, ROOT
from benchmarks.kernels_check import before
from benchmarks.tables import markdown

from . import reasons, works
from .machines import MACHINES

IN_FLIGHT = 264  # blocks: two on each multiprocessor of an H100
CACHE_BYTES = 50 << 20  # L2 of an H100 or H200
PAGE = ROOT / "docs" / "gpu-evidence.md"
TITLES = {
    "prototype_contrastive_loss": "Contrast: unit S, the bytes of the features",
    "class_moments": "Class moments, normalised: unit S, the bytes of the features",
    "upsampled_cross_entropy": "Up-sampled cross-entropy with its gradient: unit U, the bytes that the up-sampled map would have",
    "upsampled_prediction": "Up-sampled prediction: unit U",
    "upsampled_confusion": "Up-sampled confusion: unit U",
}


class Goal(NamedTuple):
    words: str
    most: float
    of: Callable[[dict], Iterator[float | None]]  # a row -> what is held against `most`
    ops: tuple[str, ...]
    layouts: tuple[str, ...] = ("even", "odd", "channels_last")


def _phases(row: dict) -> list[dict]:
    return [row[phase] for phase in ("forward", "backward") if phase in row]


def _read(row: dict) -> Iterator[float]:
    yield from (phase["read"] for phase in _phases(row))


def running_bytes(kernel: dict) -> int:
    """That IN_FLIGHT blocks touch; what all of them read is there once."""
    own = kernel["block_footprint_bytes"] - kernel["common_bytes"]
    return IN_FLIGHT * own + kernel["common_bytes"]


def _from_dram(row: dict) -> Iterator[float]:
    """Features that a pass reads, but what a block reads again while it is in L2."""
    for phase in _phases(row):
        yield sum(
            k["compulsory"] + (k["again"] if running_bytes(k) > CACHE_BYTES and not works.is_reused_at_once(k) else 0)
            for k in phase["kernels"]
        )


def _sectors(row: dict) -> Iterator[float | None]:
    for phase in _phases(row):
        for moved, needed in (("read_sectors", "read"), ("gradient_sectors", "gradient_written")):
            yield phase[moved] / phase[needed] if phase[needed] else None


def _shared(row: dict) -> Iterator[float | None]:
    for phase in _phases(row):
        for kernel in phase["kernels"]:
            yield kernel.get("shared_reads_over_ideal")
            yield kernel.get("shared_writes_over_ideal")


MAPS = ("prototype_contrastive_loss", "class_moments")
GOALS = (
    Goal("features read, in S per pass", 1.05, _read, MAPS),
    Goal("features read from DRAM, in S per pass: what is still in L2 left out", 1.05, _from_dram, MAPS),
    Goal("gradient written, in S", 1.0, lambda row: (phase["gradient_written"] for phase in _phases(row)), MAPS),
    Goal("sectors moved over bytes asked for, rows aligned", 1.10, _sectors, MAPS, ("even", "channels_last")),
    Goal("sectors moved over bytes asked for, odd rows", 1.20, _sectors, MAPS, ("odd",)),
    Goal("shared-memory wavefronts over ideal", 1.15, _shared, MAPS),
    Goal("all bytes asked for, in U", 0.20, lambda row: (row["forward"]["all_requested"],), ("upsampled_cross_entropy",)),
)  # fmt: skip

HEAD = """# What the GPU kernels move, counted without a GPU

Made by `python -m benchmarks.traffic` from `benchmarks/results/traffic.json`; do not edit. **Rung: counted.** Every load
and store of the kernels' own source was run on a CPU and counted: Triton's in its interpreter with the tiles that it
launches on sm_90, CUDA's in the emulator of the tests. No time is derived from it, and none was measured on a GPU yet.

* *read*: bytes of the features that a pass asks for. The floor is 1.00 each for forward and backward, as the backward's
  gradient depends on a sum over the whole forward.
* *again*: sectors that a block reads and had read before. No such reuse is farther apart than all that the block touches;
  *in flight* is that of 264 blocks, two on each of the 132 multiprocessors of an H100 or H200, with what all of them read
  (the prototypes) once. Where it is below their L2 of 50 MB, the second read is served from there. Blocks that share a
  tile of pixels are next to each other in launch order: they find it there if they walk in step.
* *sectors*: what moves for it in whole sectors of 32 bytes. More than *read*: rows that are not aligned to a sector,
  where neighbouring tiles both move the sector that they share.
* *all*: every byte that is asked for, labels, prototypes, saved values and workspaces included. On these few pixels the
  prototypes weigh far more than at full size.
* *shared r / w*: wavefronts of shared-memory reads and writes over what they would be without bank conflicts (CUDA
  alone: Triton's shared memory is its compiler's).
* *half*: bfloat16 on CUDA, float16 in Triton's interpreter; both are 2 bytes.
* Formulas of PyTorch: bytes that their operations read and write, one after the other.
"""


def _over_ideal(phase: dict, key: str) -> str:
    values = [kernel[key] for kernel in phase["kernels"] if kernel.get(key) is not None and kernel["read"]]
    return f"{max(values):.2f}" if values else ""


def _cells(phase: dict, upsampled: bool) -> list[str]:
    if "operations" in phase:
        return [f"{phase['operations']} operations", *[""] * (5 if upsampled else 7), f"{phase['all_requested']:.2f}"]
    running = max((running_bytes(k) for k in phase["kernels"] if k["read"]), default=0)
    gradient = [f"{phase['gradient_written']:.2f}", f"{phase['gradient_sectors']:.2f}"]
    return [
        f"{phase['read']:.2f}", f"{phase['read_sectors']:.2f}", f"{phase['again_in_block']:.2f}", f"{running / 2**20:.0f}",
        *([] if upsampled else gradient), _over_ideal(phase, "shared_reads_over_ideal"), _over_ideal(phase, "shared_writes_over_ideal"),
        f"{phase['all_requested']:.2f}",
    ]  # fmt: skip


def table(op: str, rows: list[dict]) -> str:
    upsampled = op not in MAPS
    lines = []
    for row in rows:
        for name in ("forward", "backward"):
            if name in row and not (upsampled and name == "backward" and row["by"] in GPU_BACKENDS):
                lines.append([row["case"].partition(", ")[2], row["by"], name, *_cells(row[name], upsampled)])
    gradient = [] if upsampled else ["gradient written", "its sectors"]
    header = [
        "shape, type, rows", "by", "pass", "read", "sectors", "again", "in flight MB", *gradient, "shared r", "shared w", "all",
    ]  # fmt: skip
    return markdown(header, lines, numbers=False)


def ours(result: dict) -> list[dict]:
    return [row for row in result["rows"] if row["by"] in GPU_BACKENDS]


def misses(goal: Goal, result: dict) -> list[tuple[str, str, float]]:
    """case, backend and the worst figure of each row beyond the goal."""
    found = []
    for row in ours(result):
        op, *rest = row["case"].split(", ")
        if op in goal.ops and rest[2] in goal.layouts:
            worst = max((value for value in goal.of(row) if value is not None), default=0.0)
            if worst > goal.most + 5e-3:  # the figures have three decimals
                found.append((row["case"], row["by"], worst))
    return found


def goals_table(result: dict) -> str:
    rows = []
    for goal in GOALS:
        held = [
            r for r in ours(result) if r["case"].split(", ")[0] in goal.ops and r["case"].split(", ")[3] in goal.layouts
        ]
        late = misses(goal, result)
        worst = max(late, key=lambda miss: miss[2], default=None)
        rows.append([
            goal.words, f"≤ {goal.most:.2f}", f"{len(held) - len(late)} of {len(held)}",
            "" if worst is None else f"{worst[2]:.2f}: {worst[1]}, {worst[0]}",
        ])  # fmt: skip
    return markdown(["goal", "value", "rows that meet it", "the farthest miss"], rows, numbers=False)


def verdict_table(result: dict) -> str:
    rows = []
    for row in ours(result):
        if not works.Problem.of(row["case"]).is_quoted:
            continue
        by_machine = [works.verdicts(row, machine) for machine in MACHINES]
        for phase in by_machine[0]:
            found = [verdicts[phase] for verdicts in by_machine]
            cells = [cell for v in found for cell in (v.limiter, v.kernel.removesuffix("_kernel"), f"{v.share:.2f}")]
            op, _, rest = row["case"].partition(", ")
            rows.append([op, rest, row["by"], phase, *cells])
    machines = [f"{m.name}: {what}" for m in MACHINES for what in ("limiter", "kernel", "share of copy speed")]
    return markdown(["op", "shape, type, rows", "by", "pass", *machines], rows, numbers=False)


def hidden_latency(result: dict) -> str:
    """Which kernels of A and B hold neither two blocks nor 32 KB in flight on a multiprocessor of an H200."""
    late, count, machine = [], 0, MACHINES[0]
    for row in ours(result):
        problem = works.Problem.of(row["case"])
        if not (problem.is_quoted and problem.is_map and problem.shape in "AB"):
            continue
        for phase in row.keys() & {"forward", "backward"}:
            for k, work in zip(row[phase]["kernels"], works.works(row, phase, machine), strict=True):
                if not k["read"]:
                    continue
                count += 1
                resident, bytes_ = work.resident_blocks or 0, work.in_flight_bytes or 0
                if resident < 2 and resident * bytes_ < machine.in_flight_bytes:
                    kept = f"{resident} block, {resident * bytes_ / 1024:.0f} KB"
                    late.append(f"* {row['by']}, {row['case']}: {work.name}, {kept}")
    head = (
        f"Two blocks or 32 KB in flight per multiprocessor (sm_90, A and B): {count - len(late)} of {count} kernels.\n"
    )
    return "\n".join([head, *sorted(late), ""])


def text(result: dict) -> str:
    parts = [
        HEAD,
        "## Goals\n",
        goals_table(result) + "\n",
        reasons.MISSED,
        reasons.before_and_after(result),
        before.section(),
    ]
    parts += [reasons.VERDICT, verdict_table(result) + "\n", hidden_latency(result), reasons.STATIC]
    for op, title in TITLES.items():
        rows = [row for row in result["rows"] if row["case"].split(", ")[0] == op]
        parts += [f"## {title}\n", table(op, rows) + "\n"]
    return "\n".join(parts)


def write(result: dict) -> None:
    PAGE.write_text(text(result), encoding="utf-8")


def line(row: dict) -> str:
    """For the terminal."""
    read = " ".join(f"{name} {row[name]['all_requested']:.2f}" for name in ("forward", "backward") if name in row)
    features = " ".join(f"{phase['read']:.2f}" for phase in _phases(row) if "read" in phase)
    return f"{row['case']:62s} {row['by']:9s} all {read}" + (f"   features {features}" if features else "")
