"""`make bench` does not rot: a small shape of every op runs, ours and a peer, checked and untimed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_cpu_benchmarks_run_and_check_their_answers():
    peers = "spcl_fast,one-hot product,channel_first,interpolate"
    command = [sys.executable, "-m", "benchmarks.cpu", "--check", "--shape", "E',U3'", "--peers", peers]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280)
    checked = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("  checked: ")]
    pairs = ["channel_first, spcl_fast", "one-hot product, spcl_fast", *["interpolate, spcl_fast"] * 2]
    assert done.returncode == 0 and checked == pairs, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_cases_run_under_pytest_benchmark():
    words = ["-vv", "-k", "class_moments and E and spcl_fast", "--benchmark-disable"]
    command = [sys.executable, "-m", "pytest", "benchmarks/cpu/test_speed.py", *words]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "test_speed[class_moments-E'-spcl_fast] PASSED" in done.stdout
