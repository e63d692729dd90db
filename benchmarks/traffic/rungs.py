"""README's table of the GPU kernels: one column per rung of evidence, none of them a guess."""

from __future__ import annotations

import json

from benchmarks import GPU_BACKENDS, RESULTS

from . import works
from .machines import H200

_OPS = {"prototype_contrastive_loss": "contrast", "class_moments": "class moments"}
_CASES = (
    *(f"prototype_contrastive_loss, {shape}, half, {rows}" for shape, rows in (("A", "odd"), ("B", "even"), ("C", "even"))),
    *(f"class_moments, {shape}, half, {rows}" for shape, rows in (("A", "odd"), ("B", "even"))),
)  # fmt: skip


def gpu_table() -> str:
    """Of the kernel that takes longest in a pass, on an H200, in half floats."""
    rows = {(r["case"], r["by"]): r for r in json.loads((RESULTS / "traffic.json").read_text(encoding="utf-8"))["rows"]}
    lines = [
        "| op, shape, bfloat16 | backend | pass | counted: features read, S | static: registers | floor: share of copy speed | limiter "
        "| measured |",
        "|---|---|---|---:|---:|---:|---|---|",
    ]
    for case in _CASES:
        problem = works.Problem.of(case)
        for by in GPU_BACKENDS:
            row = rows[case, by]
            for phase, verdict in works.verdicts(row, H200).items():
                static = works.static_of(verdict.kernel, by, problem, H200)
                registers = str(static["registers"] if static else "")
                cells = [
                    f"{_OPS[problem.op]} {problem.shape}", by, phase, f"{row[phase]['read']:.2f}", registers, f"{verdict.share:.2f}",
                    verdict.limiter, "not yet measured on a GPU",
                ]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
