"""What the CPU benchmarks share: the problems, the floors measured in the same run, and the figures.

`python -m benchmarks.cpu` prints them; with `--save-results` they also go to benchmarks/results/cpu_ops.json.
Threads: 2, or SPCL_FAST_BENCH_THREADS. Times are wall-clock milliseconds per call; the gradient is dropped and made anew in each.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import RESULTS, shapes
from benchmarks.machine import describe_cpu
from benchmarks.problems import contrast_problem, upsampling_problem

SAVED = RESULTS / "cpu_ops.json"
THREADS = int(os.environ.get("SPCL_FAST_BENCH_THREADS", "2"))


@dataclass(frozen=True)
class Problem:
    name: str
    features: torch.Tensor
    labels: torch.Tensor
    prototypes: torch.Tensor

    @property
    def num_classes(self) -> int:
        return len(self.prototypes)

    @property
    def shape(self) -> dict[str, int]:
        return dict(zip("BDhwK", shapes.CONTRAST[self.name], strict=True))


@dataclass(frozen=True)
class UpsampledProblem:
    name: str
    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def shape(self) -> dict[str, int]:
        low, size = shapes.UPSAMPLED[self.name]
        return dict(zip("BKhwHW", (*low, *size), strict=True))


@functools.lru_cache(maxsize=1)
def make_problem(name: str) -> Problem:
    *shape, num_classes = shapes.CONTRAST[name]
    features, labels, prototypes = contrast_problem(tuple(shape), num_classes)
    return Problem(name, features.requires_grad_(), labels, prototypes)


@functools.lru_cache(maxsize=1)
def make_upsampled_problem(name: str) -> UpsampledProblem:
    logits, labels = upsampling_problem(*shapes.UPSAMPLED[name])
    return UpsampledProblem(name, logits.requires_grad_(), labels)


def _best_ms(call: Callable[[], object]) -> float:
    """The best of 7, after one to warm up."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


@functools.lru_cache(maxsize=1)
def exp_ms(name: str) -> float:
    """One torch.exp over a map as large as the up-sampled logits, into a map that is there already."""
    (batch, num_classes, *_), size = shapes.UPSAMPLED[name]
    full = torch.randn(batch, num_classes, *size, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(full)
    return _best_ms(lambda: torch.exp(full, out=out))


@functools.lru_cache(maxsize=1)
def floors_ms(name: str) -> dict[str, float]:
    """Best of 7: a copy of the features (2 S of traffic, buffers warm), and the two matrix products of the loss by torch.mm."""
    problem = make_problem(name)
    features, prototypes = problem.features.detach(), problem.prototypes
    target, weight = torch.empty_like(features), torch.rand(problem.num_classes, features[0, 0].numel())
    logits, gradient = torch.empty_like(weight), torch.empty_like(features[0]).flatten(1)

    def copy():
        target.copy_(features)

    def products():
        for image in features:
            torch.mm(prototypes, image.flatten(1), out=logits)
            torch.mm(prototypes.t(), weight, out=gradient)

    return {"copy": _best_ms(copy), "products": _best_ms(products)}


# ---- figures ------------------------------------------------------------------------------------------------------

figures: dict[str, dict[str, dict]] = {}  # op -> shape -> {"shape", "times", "skipped", "floor", ...}


def entry(op: str, problem: Problem | UpsampledProblem) -> dict:
    return figures.setdefault(op, {}).setdefault(problem.name, {"shape": problem.shape, "times": {}, "skipped": {}})


def note_skipped(op: str, problem: Problem | UpsampledProblem, peer: str, reason: str) -> None:
    entry(op, problem)["skipped"][peer] = reason


def set_floor(op: str, problem: Problem | UpsampledProblem, floor_ms: float, words: str) -> None:
    entry(op, problem)["floor"] = {"ms": round(floor_ms, 3), "is": words}


def finish(op: dict) -> None:
    """Ratios of medians and the share of the floor."""
    for one in op.values():
        ours = one["times"].get("spcl_fast")
        if ours is None:
            continue
        one["times_faster_than"] = {
            peer: round(stats["median_ms"] / ours["median_ms"], 2)
            for peer, stats in one["times"].items()
            if peer != "spcl_fast"
        }
        if "floor" in one:
            one["share_of_floor"] = round(one["floor"]["ms"] / ours["median_ms"], 3)


def save(exit_status: int) -> None:
    SAVED.parent.mkdir(parents=True, exist_ok=True)
    SAVED.write_text(
        json.dumps({"machine": describe_cpu(THREADS), "exit_status": exit_status, "ops": figures}, indent=1) + "\n"
    )
