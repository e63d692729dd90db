"""How time grows with pixels, channels and classes, and memory with the resolution, of ours and of the users' formula.

    python -m benchmarks.cpu.growth [--only pixels,memory] [--save]

prototype_contrastive_loss, forward and backward, float32. Two decades of each; the exponent is the slope of a line through the
logarithms, over all of it and over its upper decade, where what a call costs anyway no longer counts. Peaks are the resident set above
what was resident before, the gradient included, each in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import RESULTS
from benchmarks.cpu.contrast import TEMPERATURE, ours
from benchmarks.cpu.floors import THREADS
from benchmarks.cpu.timing import in_turn
from benchmarks.machine import describe_cpu
from benchmarks.peers.formulas import released_contrast
from benchmarks.problems import contrast_problem
from spcl_fast.train import memory

SAVED = RESULTS / "cpu_growth.json"
# what grows -> its values, and (B, D, h, w), K at each of them
AXES: dict[str, tuple[Sequence[int], Callable[[int], tuple[tuple[int, int, int, int], int]]]] = {
    "pixels": ((2048, 4096, 8192, 16384, 32768, 65536, 131072, 204800), lambda n: ((1, 64, n // 64, 64), 19)),
    "channels": ((20, 40, 80, 160, 320, 640, 1280, 2000), lambda d: ((1, d, 96, 128), 19)),
    "classes": ((10, 20, 40, 80, 160, 320, 640, 1000), lambda k: ((1, 256, 32, 64), k)),
}
RESOLUTIONS = ((64, 128), (128, 256), (256, 512), (512, 1024))  # 64 channels, 19 classes
FUNCTIONS = {"ours": ours, "users' formula": released_contrast}


def step(function: Callable, features: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor) -> None:
    features.grad = None
    function(features, labels, prototypes, TEMPERATURE).backward()


def exponent(values: Sequence[float], times: Sequence[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    x, y = [math.log(value) for value in values], [math.log(ms) for ms in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / sum((a - mean_x) ** 2 for a in x)


def times_along(axis: str) -> dict[str, Any]:
    values, problem_at = AXES[axis]
    found: dict[str, list[float]] = {name: [] for name in FUNCTIONS}
    for value in values:
        shape, num_classes = problem_at(value)
        features, labels, prototypes = contrast_problem(shape, num_classes)
        features.requires_grad_()
        calls = {name: functools.partial(step, f, features, labels, prototypes) for name, f in FUNCTIONS.items()}
        for name, stats in in_turn(calls, rounds=9, slow_rounds=2).items():
            found[name].append(stats["min_ms"])
    upper = [i for i, value in enumerate(values) if value >= values[-1] / 10]
    exponents = {
        name: {
            "all": round(exponent(values, times), 3),
            "upper decade": round(exponent([values[i] for i in upper], [times[i] for i in upper]), 3),
        }
        for name, times in found.items()
    }
    print(axis, list(values), found, exponents, flush=True)
    return {"values": list(values), "ms": found, "exponents": exponents}


def peaks() -> dict[str, Any]:
    found: dict[str, list[int]] = {name: [_peak_of(name, *size) for size in RESOLUTIONS] for name in FUNCTIONS}
    print("peaks", RESOLUTIONS, found, flush=True)
    gradient = [4 * 64 * height * width for height, width in RESOLUTIONS]
    return {"height_width": [list(size) for size in RESOLUTIONS], "gradient_bytes": gradient, "peak_bytes": found}


def _peak_of(name: str, height: int, width: int) -> int:
    command = [sys.executable, "-m", "benchmarks.cpu.growth", "--peak", name, str(height), str(width)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _print_peak(name: str, height: int, width: int) -> None:
    small, whole = contrast_problem((1, 64, 8, 8), 19), contrast_problem((1, 64, height, width), 19)
    for features, *_ in (small, whole):
        features.requires_grad_()
    step(FUNCTIONS[name], *small)  # what libraries set up at their first call is not the call's
    memory.reset_peak()
    before = memory.resident_bytes()
    step(FUNCTIONS[name], *whole)
    print(memory.peak_bytes() - before)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"of {', '.join((*AXES, 'memory'))}, comma-separated")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name}")
    parser.add_argument("--peak", nargs=3, metavar=("WHICH", "HEIGHT", "WIDTH"), help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    if asked.peak:
        _print_peak(asked.peak[0], int(asked.peak[1]), int(asked.peak[2]))
        return 0
    wanted = asked.only.split(",") if asked.only else [*AXES, "memory"]
    rows = {axis: peaks() if axis == "memory" else times_along(axis) for axis in wanted}
    if asked.save:
        record = json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {}
        SAVED.write_text(
            json.dumps(record | {"machine": describe_cpu(THREADS)} | rows, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
