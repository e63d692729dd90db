"""The baseline level cross-compiled for arm64 and run under emulation, against the same program on this machine.

    make arm64

Compiled without fused multiply-adds, which the baseline of x86-64 does not have, every op gives the same bits on both. As setup.py compiles
it, with them, every op is within float32's rounding of that. Needs Debian's g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.levels.build import Target, built, op_names

CROSS = "aarch64-linux-gnu-g++"
HERE = Target("baseline", "baseline", "g++", ("-ffp-contract=off",))
UNFUSED = Target("arm64_unfused", "baseline", CROSS, ("-ffp-contract=off",))
AS_BUILT = Target("arm64", "baseline", CROSS)
TOLERANCE = 1e-5  # of the largest value of a part of an op's results; float32 has 6e-8, and sums of hundreds of terms are among them
TOLERANCE_BFLOAT16 = 2**-8  # the same of gradients that are rounded to bfloat16
BFLOAT16 = {"contrast_backward_bf16"}
TIES = 1e-3  # of the labels and of the counts: where two logits differ by rounding


def emulator() -> str:
    found = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if found is None:
        raise SystemExit("qemu-aarch64 was not found. On Debian: apt install qemu-user.")
    return found


def results(program: list[str], op: str) -> list[np.ndarray]:
    """The parts of what an op gives, float32."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out"
        done = subprocess.run([*program, op, str(file)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(program)} {op} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return parts(np.fromfile(file, dtype=np.float32))


def parts(numbers: np.ndarray) -> list[np.ndarray]:
    """Each part stands after its size."""
    found, at = [], 0
    while at < len(numbers):
        size = int(numbers[at])
        found.append(numbers[at + 1 : at + 1 + size])
        at += 1 + size
    return found


def same_bits(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return [x.tobytes() for x in a] == [x.tobytes() for x in b]


def distance(a: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference of a part, as a share of its largest value; infinite where something is not finite, sizes differ, or more
    whole numbers differ than TIES allows.
    """
    if [x.shape for x in a] != [x.shape for x in expected]:
        return float("inf")
    return max(map(_distance, a, expected))


def _distance(a: np.ndarray, expected: np.ndarray) -> float:
    if not (np.isfinite(a).all() and np.isfinite(expected).all()):
        return float("inf")
    if (expected == np.round(expected)).all():
        return 0.0 if np.mean(a != expected) <= TIES else float("inf")
    return float(np.abs(a.astype(np.float64) - expected).max() / np.abs(expected).max())


def main() -> int:
    qemu = emulator()
    here, unfused, as_built = [str(built(HERE))], [qemu, str(built(UNFUSED))], [qemu, str(built(AS_BUILT))]
    failed = False
    for op in op_names(here):
        expected = results(here, op)
        same, far = same_bits(results(unfused, op), expected), distance(results(as_built, op), expected)
        good = same and far <= (TOLERANCE_BFLOAT16 if op in BFLOAT16 else TOLERANCE)
        failed |= not good
        words = "the same bits" if same else "OTHER BITS"
        print(f"{op:<36}{words}; with fused multiply-adds within {far:.1e}{'' if good else '  FAILED'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
