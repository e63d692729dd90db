"""What the CPU benchmarks share: the shapes, the problems, the floors measured in the same run, and the figures.

`python -m pytest benchmarks --benchmark-only` prints them; with `--save-results` they also go to benchmarks/results/cpu_ops.json.
Threads: 2, or SPCL_FAST_BENCH_THREADS. Times are wall-clock milliseconds per call; the gradient is dropped and made anew in each.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SHAPES = {  # B, D, h, w, K; float32
    "A": (1, 2048, 91, 161, 19),
    "B'": (2, 256, 128, 256, 19),
    "C'": (1, 512, 128, 256, 150),
    "E'": (2, 64, 256, 512, 19),
}
UPSAMPLED_SHAPES = {  # B, K, h, w, H, W; float32
    "U1": (1, 19, 91, 161, 720, 1280),
    "U2": (2, 19, 128, 256, 512, 1024),
    "U3'": (2, 150, 64, 64, 256, 256),
}
RESULTS = Path(__file__).parent / "results" / "cpu_ops.json"
THREADS = int(os.environ.get("SPCL_FAST_BENCH_THREADS", "2"))


@dataclass(frozen=True)
class Problem:
    name: str
    features: torch.Tensor
    labels: torch.Tensor  # uint8 [B, h, w] in blocks of 8 x 8, a tenth of them ignored
    prototypes: torch.Tensor

    @property
    def num_classes(self) -> int:
        return len(self.prototypes)

    @property
    def shape(self) -> dict[str, int]:
        return dict(zip("BDhwK", SHAPES[self.name], strict=True))


@dataclass(frozen=True)
class UpsampledProblem:
    name: str
    logits: torch.Tensor
    labels: torch.Tensor  # uint8 [B, H, W] in blocks of 8 x 8, a tenth of them ignored

    @property
    def shape(self) -> dict[str, int]:
        return dict(zip("BKhwHW", UPSAMPLED_SHAPES[self.name], strict=True))


def _blocks_of_labels(
    batch: int, height: int, width: int, num_classes: int, generator: torch.Generator
) -> torch.Tensor:
    blocks = torch.randint(0, num_classes, (batch, height // 8 + 1, width // 8 + 1), generator=generator)
    blocks[torch.rand(blocks.shape, generator=generator) < 0.1] = 255
    return blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].to(torch.uint8).contiguous()


@functools.lru_cache(maxsize=1)
def make_problem(name: str) -> Problem:
    batch, dim, height, width, num_classes = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, dim, height, width, generator=generator)
    labels = _blocks_of_labels(batch, height, width, num_classes, generator)
    prototypes = torch.nn.functional.normalize(torch.randn(num_classes, dim, generator=generator), dim=1)
    return Problem(name, features.requires_grad_(), labels, prototypes)


@functools.lru_cache(maxsize=1)
def make_upsampled_problem(name: str) -> UpsampledProblem:
    batch, num_classes, low_height, low_width, height, width = UPSAMPLED_SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(batch, num_classes, low_height, low_width, generator=generator)
    return UpsampledProblem(
        name, logits.requires_grad_(), _blocks_of_labels(batch, height, width, num_classes, generator)
    )


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
    batch, num_classes, _, _, height, width = UPSAMPLED_SHAPES[name]
    full = torch.randn(batch, num_classes, height, width, generator=torch.Generator().manual_seed(0))
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
_load = os.getloadavg()[0]


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


def machine() -> dict:
    from spcl_fast.backends import cpu as cpu_backend

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    instructions = None
    if (
        cpu_backend.why_not(
            "class_moments", device=torch.device("cpu"), dtype=torch.float32, num_classes=2, dim=2, has_variances=False
        )
        is None
    ):
        from spcl_fast import _cpu

        instructions = _cpu.cpu_capability()
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": THREADS, "instructions": instructions, "load_before": round(_load, 2),
        "python": platform.python_version(), "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def save(exit_status: int) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), "exit_status": exit_status, "ops": figures}, indent=1) + "\n")
