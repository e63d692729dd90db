"""One adaptation step really run on the CPU, its peak next to `plan`'s number for the same settings.

    python -m benchmarks.memory.full_resolution [--scale 1.0] [--precision bf16] [--checkpoint auto] [--keep-gradients] [--channels-last]

Sizes are 1914x1052 + 2048x1024 times --scale, one image each, DeepLab-v2 on ResNet-101 with random weights, random images and labels.
What is measured: the highest resident set of this process during the step (VmHWM, reset before it), minus what is resident after the
imports and one step of the same net at 64x64, whose tensors are gone by then: interpreter, libraries, oneDNN's compiled kernels. The
optimiser's state is there before the step, as it is in every step but the first. glibc would keep freed blocks of up to 32 MiB for later:
the process starts itself anew with a fixed threshold above which memory goes back at once, and one arena.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

from benchmarks import RESULTS

SAVED = RESULTS / "full_resolution_cpu.json"
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def config_of(options: argparse.Namespace, sizes: tuple[tuple[int, int], tuple[int, int]]):
    from spcl_fast.config.load import load_config

    loop = {
        "precision": options.precision,
        "checkpoint": options.checkpoint,
        "absorb_gradients": str(not options.keep_gradients).lower(),
    }
    given = {f"loop.{key}": value for key, value in loop.items()} | {"loop.device": "cpu", "adapt.batch_size": "1"}
    given |= {"loop.channels_last": str(options.channels_last).lower()}
    given |= {f"{side}.size": f"{size[0]}x{size[1]}" for side, size in zip(("source", "target"), sizes, strict=True)}
    return load_config("gta5_cityscapes", (), (), list(given.items()))


def run_step(config, seed: int = 0):
    """-> (seconds, peak above what was resident before the step's own tensors)."""
    import torch

    from spcl_fast.memory_plan.peak import prepare, step_of
    from spcl_fast.method.adapt import STAGE as ADAPT
    from spcl_fast.train import memory

    gc.collect()
    before = memory.resident_bytes()
    torch.manual_seed(seed)
    work = step_of(config, ADAPT.name, 19)
    for domain in work.batch:
        domain.images.uniform_()
        domain.labels.random_(0, 19)
    prepare(work)
    gc.collect()
    assert memory.reset_peak(), "this system does not let a process reset its peak"
    start = time.monotonic()
    work.step(work.batch, 0)
    for optimizer in work.optimizers:
        optimizer.step()
    return time.monotonic() - start, memory.peak_bytes() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of width and height")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--checkpoint", choices=("none", "stage", "block", "auto"), default="auto")
    parser.add_argument("--keep-gradients", action="store_true", help="without loop.absorb_gradients")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, help=f"result file (default {SAVED.name} at --scale 1, else none)")
    options = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in _MALLOC.items()):
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.memory.full_resolution", *sys.argv[1:]],
            os.environ | _MALLOC,
        )
    import torch

    from spcl_fast.memory_plan.peak import peak_memory
    from spcl_fast.method.adapt import STAGE as ADAPT

    sizes = tuple(tuple(round(v * options.scale) for v in size) for size in ((1914, 1052), (2048, 1024)))
    config = config_of(options, sizes)
    predicted = peak_memory(config, ADAPT.name)
    run_step(config_of(options, ((64, 64), (64, 64))))
    seconds, peak = run_step(config)
    record = {
        "source": list(sizes[0]), "target": list(sizes[1]), "precision": options.precision, "checkpoint": options.checkpoint,
        "absorb_gradients": not options.keep_gradients, "channels_last": options.channels_last,
        "predicted_bytes": predicted.peak_bytes, "predicted_categories": predicted.categories,
        "measured_bytes": peak, "measured_over_predicted": round(peak / predicted.peak_bytes, 4),
        "seconds": round(seconds, 1), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    out = options.out or (SAVED if options.scale == 1 else None)
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
