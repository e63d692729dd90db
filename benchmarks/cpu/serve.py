"""python serve.py SITE ROOT: one line "op shape" in, one line of milliseconds out, by the spcl_fast that lies in SITE.

Of the checkout at ROOT only benchmarks/shapes.py and problems.py are read, so that any revision that has the four ops can be timed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

SITE, ROOT = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
sys.path[0] = str(SITE)  # before what is installed, and instead of this folder


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calls(op: str, shape: str) -> Callable[[], object]:
    """Forward and backward of one op on one shape; its inputs are kept."""
    import spcl_fast as sf

    shapes, problems = _module("shapes"), _module("problems")
    if op.startswith("upsampled"):
        low, size = shapes.UPSAMPLED[shape]
        logits, labels = problems.upsampling_problem(low, size)
        if op == "upsampled_prediction":
            return lambda: sf.upsampled_prediction(logits, size, backend="cpu")
        logits.requires_grad_()

        def cross_entropy() -> None:
            logits.grad = None
            sf.upsampled_cross_entropy(logits, labels, temperature=1.8, backend="cpu").backward()

        return cross_entropy
    *size, num_classes = shapes.CONTRAST[shape]
    features, labels, prototypes = problems.contrast_problem(tuple(size), num_classes)
    if op == "class_moments":
        return lambda: sf.class_moments(features, labels, num_classes, backend="cpu")
    features.requires_grad_()

    def contrast() -> None:
        features.grad = None
        sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1, backend="cpu").backward()

    return contrast


def main() -> None:
    import torch

    import spcl_fast

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    assert spcl_fast.__file__ is not None and Path(spcl_fast.__file__).is_relative_to(SITE), spcl_fast.__file__
    print("ready", flush=True)
    made, call = "", None
    for line in sys.stdin:
        if line != made:
            call = None
            call, made = calls(*line.split()), line
            call(), call()
        assert call is not None
        start = time.perf_counter()
        call()
        print(1e3 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
