"""`make bench` does not rot: a small shape of every op runs, ours and a peer, checked and untimed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_cpu_benchmarks_run_and_check_their_answers():
    chosen = "(spcl_fast or one-hot or channel_first or interpolate) and not compiled and not channels_last"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-disable",
        "-p",
        "no:cacheprovider",
        "-k",
        f"(E_prime or U3_prime) and {chosen}",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
