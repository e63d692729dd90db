"""Ours with other dtypes, layouts and numbers of threads: what a user's features may be, next to float32 NCHW with all threads.

    python -m benchmarks.cpu.variants [--shape A,B'] [--save]

Contrastive loss, forward and backward, and class sums. Every variant of a shape is timed in turn with the others, in one process. Goals:
bfloat16 and channels_last take at most 1.3 times as long as float32 NCHW, and 2 threads are at least 1.8 times as fast as 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import RESULTS, shapes
from benchmarks.cpu import contrast, moments
from benchmarks.cpu.floors import THREADS, make_problem
from benchmarks.cpu.timing import in_turn
from benchmarks.machine import describe_cpu

SAVED = RESULTS / "cpu_variants.json"
PLAIN, ONE_THREAD = "float32", "float32, 1 thread"
VARIANTS: dict[str, tuple[torch.dtype, torch.memory_format, int]] = {
    PLAIN: (torch.float32, torch.contiguous_format, THREADS),
    "channels_last": (torch.float32, torch.channels_last, THREADS),
    "bfloat16": (torch.bfloat16, torch.contiguous_format, THREADS),
    "bfloat16, channels_last": (torch.bfloat16, torch.channels_last, THREADS),
    ONE_THREAD: (torch.float32, torch.contiguous_format, 1),
}


def contrast_step(features: Tensor, labels: Tensor, prototypes: Tensor) -> None:
    features.grad = None
    contrast.ours(features, labels, prototypes, contrast.TEMPERATURE).backward()


def moments_step(features: Tensor, labels: Tensor, prototypes: Tensor) -> None:
    with torch.no_grad():
        moments.ours(features, labels, len(prototypes))


OPS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {contrast.OP: contrast_step, moments.OP: moments_step}


def with_threads(count: int, call: Callable[[], None]) -> None:
    torch.set_num_threads(count)
    call()


def times_of(op: str, shape: str) -> dict[str, dict[str, float]]:
    problem = make_problem(shape)
    calls = {}
    for name, (dtype, layout, threads) in VARIANTS.items():
        features = problem.features.detach().to(dtype).contiguous(memory_format=layout).requires_grad_()
        step = functools.partial(OPS[op], features, problem.labels, problem.prototypes.to(dtype))
        calls[name] = functools.partial(with_threads, threads, step)
    return in_turn(calls)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=",".join(shapes.CPU), help="shapes of benchmarks/shapes.py, comma-separated")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name}")
    asked = parser.parse_args(argv)
    found: dict[str, dict[str, dict]] = {op: {} for op in OPS}
    for shape in asked.shape.split(","):
        for op in OPS:
            found[op][shape] = times_of(op, shape)
            print(op, shape, {name: stats["median_ms"] for name, stats in found[op][shape].items()}, flush=True)
    if asked.save:
        record = {"machine": describe_cpu(THREADS), "ops": found}
        SAVED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
