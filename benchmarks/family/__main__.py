"""Each loss of the family next to its authors' code, on the CPU, in one run.

    git clone https://github.com/BIT-DA/SePiCo FOLDER/SePiCo      and so on: docs/switching.md has the repositories and commits
    python -m benchmarks.family --authors FOLDER [-k sepico,dino] [--save]

Both sides get the same inputs and must give the same loss, gradients and state before they are timed. Then they take turns: medians of
the wall clock and of the process's processor time, which other processes disturb less. The peak is the resident set above what was there
before the step, the gradients included, of a process of its own per side, after a step of a small problem that sets up the libraries.
A repository that is missing and a step that this machine has no memory for are skipped with that reason. Threads: 2, or
SPCL_FAST_BENCH_THREADS.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cpu.floors import THREADS
from benchmarks.cpu.timing import in_turn
from benchmarks.family import dense, prototypes, targets
from benchmarks.family.authors import Authors, Missing, stay_on_the_cpu
from benchmarks.family.case import OURS, THEIRS, Case, Step, differences, refuse_a_difference
from benchmarks.family.page import SAVED
from benchmarks.machine import describe_cpu
from spcl_fast.train import memory

CASES = {case.name: case for case in (*dense.CASES, *prototypes.CASES, *targets.CASES)}
_SIDES = (THEIRS, OURS)


class Counted:
    """A call that notes the processor time of this process; the first one, which warms up, is not counted."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.ms = call, []

    def __call__(self) -> None:
        start = time.process_time()
        self.call()
        self.ms.append(1e3 * (time.process_time() - start))

    def median_ms(self) -> float:
        return round(statistics.median(self.ms[1:]), 3)


def step_of(case: Case, side: str, authors: Authors, sizes) -> Step:
    given = case.problem(**sizes)
    return case.theirs(authors, given) if side == THEIRS else case.ours(given)


def checked(case: Case, authors: Authors, sizes) -> dict[str, float]:
    """The differences of a first step; AssertionError where the two do not give the same."""
    given = case.problem(**sizes)
    theirs = {name: value.clone() for name, value in case.theirs(authors, given)().items()}
    found = differences(theirs, case.ours(given)())
    refuse_a_difference(case, found)
    return found


def measure(case: Case, authors: Authors, rounds: int, slow_rounds: int) -> dict:
    entry: dict = {"repository": case.repository, "commit": authors.commit(case.repository), "is": case.words}
    entry |= {"sizes": dict(case.sizes), "differences": checked(case, authors, case.sizes)}
    gc.collect()
    counted = {side: Counted(step_of(case, side, authors, case.sizes)) for side in _SIDES}
    times = in_turn(counted, rounds=rounds, slow_rounds=slow_rounds)
    for side, counter in counted.items():
        entry[side] = times[side] | {"processor_ms": counter.median_ms()}
    del counted
    gc.collect()
    for side in _SIDES:
        entry[side]["peak_mb"] = round(peak_of(case, side, authors) / 1e6, 1)
    return entry | ratios(entry, case)


def ratios(entry: dict, case: Case) -> dict:
    theirs, ours = entry[THEIRS], entry[OURS]
    # a step that stays below a page of memory counts as one of 1 MB
    leaner = theirs["peak_mb"] / max(ours["peak_mb"], 1.0)
    faster = theirs["median_ms"] / ours["median_ms"]
    return {
        "times_as_fast": round(faster, 2),
        "times_as_fast_by_processor_time": round(theirs["processor_ms"] / ours["processor_ms"], 2),
        "times_less_memory": round(leaner, 1),
        "goal": case.goal._asdict(),
        "goal_is_met": case.goal.is_met(faster, leaner),
    }


def peak_of(case: Case, side: str, authors: Authors) -> int:
    command = [sys.executable, "-m", "benchmarks.family", "--authors", str(authors.folder), "--peak", case.name, side]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def print_peak(case: Case, side: str, authors: Authors) -> None:
    step_of(case, side, authors, case.small)()
    step = step_of(case, side, authors, case.sizes)
    gc.collect()
    memory.reset_peak()
    before = memory.resident_bytes()
    kept = step()
    print(memory.peak_bytes() - before)
    del kept


def why_not(case: Case, authors: Authors) -> str | None:
    try:
        authors.repository(case.repository)
    except Missing as error:
        return str(error)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _available() or free
    if available < 1e9 * case.theirs_gb:
        return f"the authors' step needs {case.theirs_gb} GB, and {available / 1e9:.1f} GB are free"
    return None


def _available() -> int:
    """Bytes that can be had without swapping, page cache included; 0 where the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


def line(name: str, entry: dict) -> str:
    sides = ", ".join(
        f"{side} {entry[side]['median_ms']:.1f} ms ({entry[side]['processor_ms']:.1f} of processor time) "
        f"{entry[side]['peak_mb']:.0f} MB"
        for side in _SIDES
    )
    return (
        f"{name}: {sides}; {entry['times_as_fast']} x as fast ({entry['times_as_fast_by_processor_time']} by processor time), "
        f"{entry['times_less_memory']} x less memory{'' if entry['goal_is_met'] else '; goal missed'}"
    )


def save(found: dict[str, dict], skipped: dict[str, str], machine: dict) -> None:
    """Cases that were not asked for stay as they are in the file, each with its own machine."""
    record = json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {"cases": {}, "skipped": {}}
    record["cases"] |= {name: entry | {"machine": machine} for name, entry in found.items()}
    record["cases"] = {name: record["cases"][name] for name in CASES if name in record["cases"]}
    record["skipped"] = {
        name: why for name, why in (record["skipped"] | skipped).items() if name not in record["cases"]
    }
    SAVED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", type=Path, required=True, metavar="FOLDER", help="clones of their repositories")
    parser.add_argument("-k", dest="names", default="", help=f"parts of names, comma-separated: {', '.join(CASES)}")
    parser.add_argument("--check", action="store_true", help="compare small problems and time nothing")
    parser.add_argument("--rounds", type=int, default=9, help="of a step below 150 ms")
    parser.add_argument("--slow-rounds", type=int, default=3, help="of a slower one")
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{SAVED.name}")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    stay_on_the_cpu()
    authors = Authors(asked.authors)
    if asked.peak:
        print_peak(CASES[asked.peak[0]], asked.peak[1], authors)
        return 0
    parts = [part for part in asked.names.split(",") if part]
    chosen = [case for case in CASES.values() if not parts or any(part in case.name for part in parts)]
    if not chosen:
        parser.error(f"no case has {asked.names!r} in its name: {', '.join(CASES)}")
    found, skipped, machine = {}, {}, describe_cpu(THREADS)
    for case in chosen:
        why = why_not(case, authors)
        if why:
            skipped[case.name] = why
            print(f"{case.name}: skipped: {why}", flush=True)
        elif asked.check:
            print(f"{case.name}: {checked(case, authors, case.small)}", flush=True)
        else:
            found[case.name] = measure(case, authors, asked.rounds, asked.slow_rounds)
            print(line(case.name, found[case.name]), flush=True)
        if asked.save and not asked.check:  # after each: a run may be stopped
            save(found, skipped, machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
