"""What the Triton backend allocates for a teacher's targets, counted where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import RESULTS, ROOT

pytest.importorskip("triton", reason="Triton is not installed")


def test_a_teacher_of_65536_classes_takes_no_memory_of_rows_times_classes():
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels_check.memory"],
        cwd=ROOT,
        env=compiled,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)["rows"]
    small, *_ = rows
    assert (small["classes"], small["rows"], small["dim"], small["dtype"]) == (65536, 5000, 256, "float32")
    assert small["bytes"] <= 1_000_000 and small["stored_bytes"] > 1_000_000_000
    assert all(row["bytes"] <= 1_000_000 for row in rows), "no copy of the prototypes in the features' dtype"
    saved = json.loads((RESULTS / "triton_teacher.json").read_text(encoding="utf-8"))
    assert saved["rows"] == rows, "python -m benchmarks.kernels_check.memory --write"
