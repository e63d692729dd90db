"""`make gpu`: check and time the GPU backends on this machine; everything goes into results/<gpu>.json, part by part.

    python -m benchmarks.gpu [--dry-run] [--parts correct,time] [--again] [--seconds 530]

Next to each time stand the bytes and the limiter that were predicted without a GPU (`predicted.py`); rows that are more than 15 % from
their prediction are named at the end. From the times of Triton's and the CUDA kernels it then makes this GPU's part of the table by which
the package picks one of them (`choice.py`); nothing is picked by times whose checks failed.

Needs torch, triton, numpy and pytest, no network and no installed package. A part that is done for these sources is not repeated, so that
a run that was stopped goes on; parts that no longer fit into --seconds are left for the next call, and say so. `--dry-run` goes through the
same code on tiny shapes on the CPU (Triton's interpreter), to prove the script; its numbers mean nothing and go to results/dry_run.json.
Exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from benchmarks import GPU_BACKENDS, RESULTS, ROOT
from benchmarks.gpu import choice, predicted
from benchmarks.gpu.where import Skipped, Where, backend_of, named
from benchmarks.machine import describe_gpu, today
from spcl_fast.kernels.pixels import interpreter_trouble

ON_EVERY_BACKEND = (
    "correct", "graph", "determinism", "big", "host", "moments", "contrast", "upsample", "source_step", "sanitizer",
)  # fmt: skip


def parts() -> dict:
    """name -> (function, seconds it needs at least). In the order of running: no speed is looked at before the answers are right.

    A name that ends in that of a backend, such as correct_cuda, is the same part on that one instead of the first.
    """
    from benchmarks.gpu import behaviour, right, speed, step, suite

    usual = {
        "build_cuda": (suite.build_cuda, 60),
        "correct": (right.accuracy, 20),
        "graph": (behaviour.graphs_and_streams, 10),
        "determinism": (behaviour.determinism, 10),
        "big": (behaviour.beyond_2_31, 15),
        "bandwidth": (speed.ceilings, 5),
        "host": (speed.host_cost, 5),
        "moments": (speed.moments, 15),
        "contrast": (speed.contrast, 40),
        "upsample": (speed.upsample, 20),
        "step": (step.adapt_steps, 60),
        "tests": (suite.test_suite, 60),
        "compile": (behaviour.compiled, 20),
        "compiled_peers": (speed.compiled_peers, 60),
        "sanitizer": (suite.sanitizer, 60),
        "source_step": (speed.source_step, 10),
    }
    return usual | {named(name, other): usual[name] for other in GPU_BACKENDS[1:] for name in ON_EVERY_BACKEND}


def sources_hash() -> str:
    digest = hashlib.sha256()
    for folder in (
        "kernels",
        "spcl_fast/ops",
        "spcl_fast/backends",
        "spcl_fast/models",
        "spcl_fast/train",
        "benchmarks",
        "csrc",
    ):
        for path in sorted((ROOT / folder).rglob("*.[chp]*")):
            if path.suffix not in (".py", ".cu", ".cuh", ".h", ".cpp"):
                continue
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def load(path: Path, again: bool) -> dict:
    fresh = {"machine": describe_gpu(), "sources": sources_hash(), "parts": {}}
    if again or not path.is_file():
        return fresh
    old = json.loads(path.read_text())
    return old if old.get("sources") == fresh["sources"] else fresh


def save(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def run_part(name: str, function, context: Where) -> dict:
    """Its result with state ok | failed | skipped; an exception is a failure that does not stop the other parts."""
    start = time.monotonic()
    try:
        if (backend := backend_of(name)) != context.backend:
            context = dataclasses.replace(context, backend=backend)
            reason = context.lacks("class_moments", torch.float32, 19, 64)
            if reason:
                raise Skipped(reason)
        result = function(context)
        state = "failed" if result.get("failures") else "ok"
    except Skipped as reason:
        result, state = {"reason": str(reason)}, "skipped"
    except Exception:
        traceback.print_exc()
        result, state = {"failures": [traceback.format_exc(limit=4)]}, "failed"
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    seconds = round(time.monotonic() - start, 1)
    print(f"[{name}] {state} in {seconds} s{': ' + result['reason'] if state == 'skipped' else ''}", flush=True)
    for failure in result.get("failures", []):
        print(f"    {failure}", flush=True)
    return {"state": state, "seconds": seconds, **result}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to prove the script")
    parser.add_argument("--parts", default="", help="comma-separated; default all")
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument(
        "--seconds", type=float, default=530, help="time for all parts; those that no longer fit wait for the next call"
    )
    parser.add_argument("--out", type=Path, help="result file (default results/<gpu>.json)")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "make gpu: torch sees no NVIDIA GPU here; `python -m benchmarks.gpu --dry-run` tries the script without one",
            file=sys.stderr,
        )
        return 1
    if options.dry_run and torch.cuda.is_available():
        print("--dry-run is for machines without a GPU", file=sys.stderr)
        return 2
    if options.dry_run and (trouble := interpreter_trouble()):
        print(f"--dry-run: {trouble}", file=sys.stderr)
        return 1
    name = "dry_run" if options.dry_run else re.sub(r"[^a-z0-9]+", "_", describe_gpu()["gpu"].lower()).strip("_")
    path = options.out or RESULTS / f"{name}.json"
    wanted = options.parts.split(",") if options.parts else list(parts())
    unknown = set(wanted) - set(parts())
    if unknown:
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(parts())}")
    device = torch.device("cpu" if options.dry_run else "cuda", None if options.dry_run else 0)
    context = Where(device, options.dry_run, time.monotonic() + options.seconds)
    results = load(path, options.again)
    results["date"] = today()
    for name in wanted:
        function, needs = parts()[name]
        if results["parts"].get(name, {}).get("state") in ("ok", "skipped") and not options.again:
            print(f"[{name}] done before", flush=True)
            continue
        if context.seconds_left < (0 if options.dry_run else needs):
            print(
                f"[{name}] left for the next call: it needs {needs} s, {context.seconds_left:.0f} s are left",
                flush=True,
            )
            continue
        results["parts"][name] = run_part(name, function, context)
        results["cuda_next_to_triton"] = choice.next_to_triton(results["parts"])
        save(path, results)
    print(f"wrote {path}")
    print(predicted.table(results["parts"]), end="\n\n")
    if not options.dry_run:
        print(choice.write(results))
    return int(any(results["parts"].get(name, {}).get("state") == "failed" for name in wanted))


if __name__ == "__main__":
    sys.exit(main())
