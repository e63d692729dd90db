"""The table of backends: which exist, which can do an op on given tensors, and which one is taken.

A backend is a module that has some of the primitives (see `reference.py` for all of them, with their contract) and
`why_not(op, **what) -> str | None`, which answers None where it can do `op` and a sentence where it cannot.
`what` describes the tensors: device, dtype, num_classes, dim, has_variances. On a GPU the faster of the usable ones is taken where a table
says which it is (`measured.py`), else the first one in the order of preference.
This file is the only one that names backends.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

from . import measured
from .measured import is_small as is_small  # what ops ask before `pick`

OPS = ("prototype_contrastive_loss", "class_moments", "upsampled_cross_entropy", "upsampled_prediction")
_MODULES = {
    "reference": "spcl_fast.backends.reference",
    "cpu": "spcl_fast.backends.cpu",
    "triton": "spcl_fast.kernels",
    "cuda": "spcl_fast.backends.cuda",
}
BACKENDS = tuple(_MODULES)
# The order of preference where nobody asked for a backend by name and nothing was measured.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


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


def pick(op: str, backend: str | None, *, small: bool, **what) -> str:
    """The backend to use: the one asked for by name, or by SPCL_FAST_BACKEND, or the fastest usable one.

    `small` is `is_small` of the problem. The same arguments have the same answer for as long as the process lives, so that a backward takes
    the backend of its forward. Raises ValueError for an unknown name and RuntimeError, with the reason, where the one asked for cannot do
    it: there is no fallback.
    """
    backend = backend or os.environ.get("SPCL_FAST_BACKEND")
    if not backend:
        device = what["device"].type
        order = _ORDER.get(device, ("reference",))
        if device == "cuda":
            order = measured.order(op, small, **what) + order
        return next(name for name in order if name == "reference" or why_not(op, name, **what) is None)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    reason = why_not(op, backend, **what)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} was asked for and cannot be used: {reason}")
    return backend


def choice_in_words(op: str, device: torch.device) -> str | None:
    """Where the choice of a backend comes from on this GPU; None on a device whose order is fixed."""
    return measured.in_words(op, device, _ORDER["cuda"][0]) if device.type == "cuda" else None


_LARGE = {
    "num_classes": 19,
    "dim": 256,
    "dtype": torch.float32,
    "has_variances": False,
}  # what is spoken of where no tensors are given


def available_backends(device: torch.device | str | None = None) -> dict[str, dict[str, str | None]]:
    """{op: {backend: None if usable, else the reason in words}} for float32 tensors on `device` (default: the GPU if there is one)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {op: {backend: why_not(op, backend, device=device, **_LARGE) for backend in BACKENDS} for op in OPS}


def taken(op: str, device: torch.device) -> str:
    """The backend that a large float32 problem with 19 classes takes where none is asked for by name."""
    return pick(op, None, device=device, small=False, **_LARGE)
