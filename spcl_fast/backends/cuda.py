"""The CUDA C++ backend ("cuda"): csrc/cuda through torch.ops.spcl_fast_cuda. Same primitives as reference.py, on CUDA tensors.

Loaded when first asked about. What cannot be loaded is a reason in words, and Triton does the work.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .labels import label_flag

OPS = ("class_moments",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cuda",)
_native = torch.ops.spcl_fast_cuda


@functools.cache
def missing() -> str | None:
    """Register the ops; None, or why they are not there. An extension that was built and does not load is worth one warning."""
    record = Path(__file__).parents[1] / "cuda_build.txt"  # written by setup.py
    reason = record.read_text(encoding="utf-8").strip() if record.exists() else "the package was not installed by setup.py"
    if reason != "built":
        return f"spcl_fast._cuda was not built: {reason}"
    try:
        importlib.import_module("spcl_fast._cuda")
    except Exception as error:
        said = f"spcl_fast._cuda was built and does not load with torch {torch.__version__}; build it again: {error}"
        warnings.warn(f"{said}. The Triton kernels are used instead; `spcl-fast doctor` says more.", RuntimeWarning, stacklevel=2)
        return said
    return None


def why_not(op: str, *, device: torch.device, dtype: torch.dtype, num_classes: int, dim: int, has_variances: bool) -> str | None:
    if device.type not in _DEVICES:
        return f"the CUDA kernels work on CUDA tensors, not on {device}"
    if op not in OPS:
        return f"the CUDA backend has no {op}; it has {' and '.join(OPS)}"
    if dtype not in _DTYPES:
        return f"the CUDA kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if has_variances:
        return "the CUDA kernels do not have the variance term; use backend='reference'"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return "the CUDA kernels need compute capability 8.0 or newer"
    return missing()


def class_moments(features, labels, num_classes, *, normalize, squares, ignore_index) -> tuple[Tensor, Tensor, Tensor]:
    """-> sums [K, D], counts [K] int64, squares [K, D] or empty. A pixel with a bad label is left out and raises the flag."""
    return _native.class_moments(features, labels, label_flag(features.device), num_classes, normalize, squares, ignore_index)
