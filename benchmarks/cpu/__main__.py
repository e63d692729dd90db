"""The ops on the CPU next to their peers: make bench, or

    python -m benchmarks.cpu [-k moments] [--shape A,U1] [--peers spcl_fast,released] [--save-results]
    python -m benchmarks.cpu --baseline REV      an older revision, built into build/baseline, next to today's

Peers run in one process, in turn, each after its answer was checked; what does not run here, or gives another answer, is skipped with the
reason. An older revision has a process of its own, since both cannot be loaded into one: calls alternate between that and a process of
today's. SPCL_FAST_CPU_CAPABILITY=avx2 holds the C++ ops to a lower instruction set; its figures are a part of their own of the file.
Threads: 2, or SPCL_FAST_BENCH_THREADS. Times are milliseconds per call; the gradient is dropped and made anew in each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks.cpu import baseline, contrast, moments, results, upsampled
from benchmarks.cpu.case import OURS, Case, runnable
from benchmarks.cpu.floors import THREADS
from benchmarks.cpu.timing import in_turn

# op -> its shapes, and what makes a case of one
OPS: dict[str, tuple[tuple[str, ...], Callable[[str], Case]]] = {
    contrast.OP: (contrast.NAMES, contrast.case),
    moments.OP: (moments.NAMES, moments.case),
    "upsampled_cross_entropy": (upsampled.NAMES, upsampled.loss_case),
    "upsampled_prediction": (upsampled.NAMES, upsampled.prediction_case),
}


def cases(keyword: str, shapes: str) -> Iterator[tuple[str, str, Callable[[str], Case]]]:
    """op, shape, maker; `keyword`: part of an op's name; shapes: comma-separated, none: all."""
    for op, (names, make) in OPS.items():
        for name in names:
            if keyword in op and (not shapes or name in shapes.split(",")):
                yield op, name, make


def measure(case: Case, peers: str, timed: bool) -> dict:
    good, skipped = runnable(case, peers)
    entry: dict = {"shape": case.sizes, "times": {}, "skipped": skipped, "checked": sorted(good)}
    if timed:
        entry["times"] = in_turn({name: case.call(function) for name, function in good.items()})
        floor = case.floor()
        entry["floor"] = {"ms": round(floor.ms, 3), "is": floor.words}
    return results.with_ratios(entry, OURS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="keyword", default="", help="part of an op's name")
    parser.add_argument("--shape", default="", help="shapes of benchmarks/shapes.py, comma-separated")
    parser.add_argument("--peers", default="", help="peers, comma-separated")
    parser.add_argument("--check", action="store_true", help="check the answers and time nothing")
    parser.add_argument("--baseline", metavar="REV", help="time this revision next to today's, and no peer")
    parser.add_argument("--save-results", action="store_true", help=f"write benchmarks/results/{results.SAVED.name}")
    asked = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    chosen = list(cases(asked.keyword, asked.shape))
    if not chosen:
        parser.error(f"no op has {asked.keyword!r} in its name and a shape of {asked.shape!r}: {', '.join(OPS)}")
    found: dict[str, dict[str, dict]] = {}
    if asked.baseline:
        revision = baseline.build(asked.baseline)
        for op, shape, ratio in baseline.ratios(revision, [(op, shape) for op, shape, _ in chosen], THREADS):
            found.setdefault(op, {})[shape] = ratio
            print(results.baseline_line(op, shape, ratio), flush=True)
        if asked.save_results:
            results.save_baseline(revision.name, found, THREADS)
        return 0
    for op, shape, make in chosen:
        case = make(shape)
        found.setdefault(op, {})[shape] = measure(case, asked.peers, timed=not asked.check)
        print("\n".join(results.lines(op, shape, found[op][shape])), flush=True)
        del case
    if asked.save_results and not asked.check:
        results.save(found, THREADS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
