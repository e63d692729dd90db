"""The table of backends: which exist, which can do an op on given tensors, and which one is taken.

A backend is a module that has some of the primitives (see `reference.py` for all of them, with their contract) and
`why_not(op, **what) -> str | None`, which answers None where it can do `op` and a sentence where it cannot.
`what` describes the tensors: device, dtype, num_classes, dim, has_variances.
This file is the only one that names backends.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

OPS = ("prototype_contrastive_loss", "class_moments", "upsampled_cross_entropy", "upsampled_prediction")
_MODULES = {
    "reference": "spcl_fast.backends.reference",
    "cpu": "spcl_fast.backends.native",
    "triton": "spcl_fast.kernels",
    "cuda": "spcl_fast.backends.cuda",
}
BACKENDS = ("reference", "cpu", "triton", "cuda")
# The order of preference where nobody asked for a backend by name. The CUDA kernels come before Triton's only where they were measured to
# be faster, and they are not yet measured on a GPU: ask for them by name.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
# What `doctor` adds to a usable backend.
REMARKS = {"cuda": "not yet measured on a GPU: taken only where asked for by name or where Triton cannot"}


@functools.cache
def _load(backend: str) -> ModuleType | str:
    """The backend's module, or the reason in words why it is not there."""
    if backend not in _MODULES:
        return f"the {backend} backend is not part of this release"
    try:
        return importlib.import_module(_MODULES[backend])
    except ImportError as error:
        return f"{_MODULES[backend]} does not import: {error}"


def module(backend: str) -> ModuleType:
    """The loaded module of a backend that `pick` has named."""
    return _load(backend)


def why_not(op: str, backend: str, **what) -> str | None:
    """None where `backend` can do `op` on tensors such as `what`, else the reason in words."""
    loaded = _load(backend)
    return loaded if isinstance(loaded, str) else loaded.why_not(op, **what)


def pick(op: str, backend: str | None, **what) -> str:
    """The backend to use: the one asked for by name, or by SPCL_FAST_BACKEND, or the first usable one of the device's order.

    Raises ValueError for an unknown name and RuntimeError, with the reason, where the one asked for cannot do it: there is no fallback.
    """
    backend = backend or os.environ.get("SPCL_FAST_BACKEND")
    if not backend:
        order = _ORDER.get(what["device"].type, ("reference",))
        return next(name for name in order if name == "reference" or why_not(op, name, **what) is None)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    reason = why_not(op, backend, **what)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} was asked for and cannot be used: {reason}")
    return backend


def available_backends(device: torch.device | str | None = None) -> dict[str, dict[str, str | None]]:
    """{op: {backend: None if usable, else the reason in words}} for float32 tensors on `device` (default: the GPU if there is one)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    what = {"device": device, "dtype": torch.float32, "num_classes": 19, "dim": 256, "has_variances": False}
    return {op: {backend: why_not(op, backend, **what) for backend in BACKENDS} for op in OPS}
