"""`make gpu` does not rot: its code runs on tiny shapes in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import choice, predicted
from spcl_fast.kernels.pixels import interpreter_trouble

ROOT = Path(__file__).resolve().parents[2]
# `python -m benchmarks.gpu` with the interpreter that the tests have
MAIN = """
import os, runpy, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [".", "tests"]
import interpreter_speed
interpreter_speed.install()
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def test_make_gpu_runs_through_on_tiny_shapes_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("--dry-run is for machines without a GPU")
    if trouble := interpreter_trouble():
        pytest.skip(trouble)
    out = tmp_path / "dry.json"
    command = [
        sys.executable,
        "-c",
        MAIN,
        "--dry-run",
        "--out",
        str(out),
        "--parts",
        "determinism,graph,moments,contrast,upsample,step,sanitizer",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert parts["contrast"]["state"] == parts["moments"]["state"] == parts["upsample"]["state"] == "ok"
    assert parts["graph"] == {"state": "skipped", "seconds": 0.0, "reason": "CUDA graphs need a GPU"}
    assert set(parts["contrast"]["rows"][1]["peers_us"]) >= {"released", "channel_first"}
    timed = {name: parts[name] for name in ("moments", "contrast", "upsample")}
    choices = choice.choices(timed | {f"{name}_cuda": part for name, part in timed.items()})
    assert {row["op"] for row in choices} == set(choice.OPS.values()) and all(
        row["order"] == ["triton", "cuda"] for row in choices
    )
    again = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert (
        again.stdout.count("done before") == len(json.loads(out.read_text())["parts"]) == 7
    )  # what is done is not done again


def timed(predicted_us: float, measured_us: float, op: str = "class_moments") -> dict:
    found = {"predicted_bytes": 2_000_000, "limiter": "DRAM bytes", "predicted_us": predicted_us}
    return {"op": op, "shape": "A", "dtype": "bfloat16", **predicted.compared(measured_us, found)}


def test_rows_that_are_far_from_their_prediction_are_named():
    parts = {
        "moments": {"rows": [timed(10.0, 11.0), timed(10.0, 13.0, "slow"), {"op": "not predicted"}]},
        "moments_cuda": {"rows": [timed(10.0, 8.0)]},
        "graph": {"state": "skipped"},
    }
    assert predicted.disagreements(parts) == [
        "triton, slow, A, bfloat16: 1.30 of the predicted time (DRAM bytes)",
        "cuda, class_moments, A, bfloat16: 0.80 of the predicted time (DRAM bytes)",
    ]
    text = predicted.table(parts)
    assert "2 of 3 rows are more than 15% from what the counts predict" in text
    assert all(word in text for word in ("11.0", "10.0", "2.0", "DRAM bytes"))
    assert predicted.table({"graph": {"state": "skipped"}}) == ""


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_every_timed_op_has_a_prediction_from_the_counts(backend):
    machine = predicted.machine_of("9.0")
    for op, (name, _) in predicted.OPS.items():
        shape, dtype = ("U2", "float32") if "upsampled" in name else ("B", "bfloat16")
        found = predicted.predicted(op, shape, dtype, backend, 4000.0, machine)
        assert found["predicted_bytes"] > 0 and found["predicted_us"] > 0 and found["limiter"]
    size = 2 * 256 * 256 * 512 * 2  # S of B in half floats
    both = predicted.predicted("contrast forward + backward", "B", "bfloat16", backend, 4000.0, machine)
    assert 3 * size <= both["predicted_bytes"] <= 4 * size
    assert both["predicted_us"] >= 3 * size / 4e6
    assert predicted.predicted("source step", "A", "bfloat16", backend, 4000.0, machine) == {}
    assert predicted.machine_of("8.0").name == "A100"
