"""The parts of `make gpu` that start other programs: building the CUDA kernels, the op tests, compute-sanitizer."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import spcl_fast as sf
from benchmarks import ROOT
from benchmarks.gpu.behaviour import one_pass_calls
from benchmarks.gpu.right import gradients
from benchmarks.gpu.where import Skipped, Where
from benchmarks.problems import contrast_problem, upsampling_problem
from spcl_fast import backends


def build_cuda(context) -> dict:
    """The CUDA extension, built in place for this GPU alone where it is not there yet."""
    if context.dry:
        raise Skipped("needs a GPU and a CUDA build of torch")
    cuda = backends.module("cuda")
    if cuda.missing() is None:
        return {"built": "before", "failures": []}
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"SPCL_FAST_CUDA_ARCHS": arch}
    try:
        run = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=context.seconds_left,
        )
    except subprocess.TimeoutExpired:
        return {"failures": ["building ran out of time"]}
    cuda.missing.cache_clear()
    reason = cuda.missing()
    if reason and "nvcc was not found" in reason:
        raise Skipped(reason)
    return {"built": arch, "failures": [f"{reason}\n{run.stderr[-600:]}"] if reason else []}


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_suite(context) -> dict:
    """The kernels' own tests, on the GPU: split over processes, since most of the time is compilation."""
    if context.dry:
        raise Skipped("`make test` runs them in the interpreter")
    files = [str(path) for path in sorted((ROOT / "tests" / "ops").glob("test_*.py"))]
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    listed = subprocess.run(
        [*command, "--collect-only", *files], env=_environment(), cwd=ROOT, capture_output=True, text=True
    )
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        return {"failures": [f"nothing collected: {listed.stdout[-500:]}{listed.stderr[-500:]}"]}
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    running = [
        subprocess.Popen(
            [*command, "--tb=line", *names[i::workers]],
            env=_environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(min(workers, len(names)))
    ]
    failures, tails = [], []
    for process in running:
        try:
            output, _ = process.communicate(timeout=max(10, context.seconds_left - 5))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            failures.append("a worker ran out of time")
        tails.append(output.strip().splitlines()[-1] if output.strip() else "no output")
        if process.returncode not in (0, 5):
            failures += [line for line in output.splitlines() if line.startswith("FAILED") or "Error" in line][:8] or [
                tails[-1]
            ]
    return {"tests": len(names), "workers": tails, "failures": failures}


def sanitizer(context) -> dict:
    """compute-sanitizer over one call of every op on odd shapes: memcheck, racecheck, initcheck, synccheck; 0 errors."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if context.dry or not Path(tool).exists():
        raise Skipped("compute-sanitizer is not here" if not context.dry else "needs a GPU")
    failures, done = [], []
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        if context.seconds_left < 45:
            break
        command = [
            tool,
            "--tool",
            kind,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "benchmarks.gpu.suite",
            context.backend,
        ]
        try:
            run = subprocess.run(
                command,
                env=_environment(),
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=max(30, context.seconds_left - 10),
            )
        except subprocess.TimeoutExpired:
            failures.append(f"{kind}: out of time")
            continue
        done.append(kind)
        if run.returncode:
            failures.append(f"{kind}: {run.stdout[-600:]}")
    return {"tools": done, "failures": failures}


def _every_op_once(backend: str) -> None:
    """What the sanitizer watches: each op and kernel form on odd shapes."""
    context = Where(torch.device("cuda", 0), False, 0.0, backend)
    for dtype, shape, classes in itertools.product(
        (torch.float32, torch.bfloat16), ((2, 33, 5, 7), (1, 600, 3, 5)), (5, 70)
    ):
        features, labels, prototypes = contrast_problem(shape, classes, dtype)
        gradients(sf.prototype_contrastive_loss, features, labels, prototypes, temperature=0.1, backend=context.backend)
        for call in one_pass_calls(context, features, labels, prototypes).values():
            call()
        sf.class_moments(features, labels, classes, squares=True, backend=context.backend)
        sf.class_moments(features, labels, 3000, backend=context.backend)
        sf.PrototypeBank(classes, shape[1], backend=context.backend).to(context.device).update_(features, labels)
    for size in ((9, 17), (2, 3)):
        logits, labels = upsampling_problem((2, 5, 3, 35), size, torch.float32)
        gradients(sf.upsampled_cross_entropy, logits, labels, backend=context.backend)
        sf.upsampled_prediction(logits, size, backend=context.backend)
    torch.cuda.synchronize()


if __name__ == "__main__":
    _every_op_once(sys.argv[1])
