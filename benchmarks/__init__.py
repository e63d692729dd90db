"""Experiments and measurements: each part runs as `python -m benchmarks.<part>` from the root of a checkout.

    cpu          the ops on the CPU, their peers in the same run          gpu         checks and times on an NVIDIA GPU
    memory       peak memory: predicted, and of a step really run         adaptation  what a recipe brings, over seeds and pairs
    kernels_check  registers, shared memory and spills, without a GPU     figures     README's tables and pictures from results/
    traffic      what the GPU kernels move, counted without a GPU         levels      the C++ kernels without torch: counts, arm64
    family       each loss next to its authors' own code, on the CPU

Works on the checkout, installed or not: on a machine without a package index `kernels/`, which lies next to `spcl_fast/`, is not a part of
an installed package, and pytest takes this module as a plugin for the same reason (`-p benchmarks`).
"""

import importlib.util
from pathlib import Path

import spcl_fast
from spcl_fast import catalog

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GPU_BACKENDS = tuple(
    row.name for row in catalog.BACKENDS if row.devices == ("cuda",)
)  # the one that is tried first is first

if importlib.util.find_spec("spcl_fast.kernels") is None:
    spcl_fast.__path__.append(str(ROOT))
