"""Instructions of each C++ op on a small problem, compiled for AVX2 and counted by callgrind, against the committed counts.

    make instructions                                          fails where a count is more than 3 % off
    make instructions ARGS="--save"                            writes benchmarks/results/instructions.json
    make instructions ARGS="--only class_moments"

A count does not depend on the processor, its load or its clock, but on the compiler: one of another version is refused. It says nothing
about caches and memory; `make bench` does. What Python and torch add to a call is not in it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.levels.build import Target, built, op_names, setup_list, version

SAVED = RESULTS / "instructions.json"
ALLOWED = 0.03
LEVEL, COMPILER = "avx2", "g++"


def count(program: Path, op: str) -> int:
    """Instructions inside of spcl_counted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=spcl_counted",
            f"--callgrind-out-file={folder}/out", str(program), op,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"^(?:summary|totals): (\d+)", _read(Path(folder) / "out"), re.MULTILINE)
    if done.returncode or found is None or int(found[1]) == 0:
        raise SystemExit(f"{' '.join(command)}\ngave no count:\n{done.stderr[-2000:]}")
    return int(found[1])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def complaints(counts: Mapping[str, int], recorded: Mapping[str, int], whole: bool = True) -> list[str]:
    """What is more than ALLOWED off, or not in both; of a part of the ops only the counts are compared."""
    found = []
    for op, number in counts.items():
        if op not in recorded:
            found.append(f"{op} has no recorded count")
        elif abs(number / recorded[op] - 1) > ALLOWED:
            change = 100 * (number / recorded[op] - 1)
            found.append(f"{op}: {number} instructions, recorded {recorded[op]}: {change:+.1f} %")
    gone = sorted(recorded.keys() - counts.keys()) if whole else []
    return [*found, *(f"{op} is recorded and does not exist" for op in gone)]


def compared(counts: dict[str, int], compiler: str, whole: bool) -> int:
    """Prints what is off; the exit code."""
    if not SAVED.exists():
        print(f"{SAVED} does not exist: make instructions ARGS=--save", file=sys.stderr)
        return 1
    record = json.loads(SAVED.read_text(encoding="utf-8"))
    if record["compiler"] != compiler:
        print(
            f"The counts were recorded with {record['compiler']}, and this is {compiler}: they cannot be compared. Count the commit "
            "before yours with this compiler (--save), then yours.",
            file=sys.stderr,
        )
        return 3
    off = complaints(counts, record["counts"], whole)
    print("\n".join(off) if off else f"{len(counts)} counts are within {100 * ALLOWED:.0f} % of those recorded")
    if off:
        print("If that is meant to be: make instructions ARGS=--save, and say why in the commit.", file=sys.stderr)
    return 1 if off else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name}")
    parser.add_argument("--only", default="", help="part of an op's name")
    asked = parser.parse_args(argv)
    if shutil.which("valgrind") is None:
        raise SystemExit("valgrind was not found. On Debian: apt install valgrind.")
    if asked.save and asked.only:
        raise SystemExit("--save writes all counts: leave out --only.")
    program = built(Target(LEVEL, LEVEL, COMPILER, tuple(setup_list("AVX2"))))
    counts = {}
    for op in op_names([str(program)]):
        if asked.only in op:
            counts[op] = count(program, op)
            print(f"{op:<36}{counts[op]:>12}", flush=True)
    compiler = version(COMPILER)
    if not asked.save:
        return compared(counts, compiler, whole=not asked.only)
    record = {"level": LEVEL, "compiler": compiler, "allowed": ALLOWED, "counts": counts}
    SAVED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
