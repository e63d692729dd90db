"""`make gpu` does not rot: its code runs on tiny shapes in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import choice
from spcl_fast.kernels.pixels import interpreter_trouble

ROOT = Path(__file__).resolve().parents[2]


def test_make_gpu_runs_through_on_tiny_shapes_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("--dry-run is for machines without a GPU")
    if trouble := interpreter_trouble():
        pytest.skip(trouble)
    out = tmp_path / "dry.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
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
