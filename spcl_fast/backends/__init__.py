"""Which backends exist, which can do what is asked, and which one is taken.

Names and modules are the catalog's; what a module has to have is contract.py. On a GPU the fastest usable one is taken where a table says
which it is (`measured.py`), else the first usable one in the catalog's order.
"""

from __future__ import annotations

import functools
import os
from typing import cast

import torch

from .. import catalog
from . import measured
from .contract import Ask, Backend
from .measured import is_small as is_small  # what ops ask before `pick`

OPS = (
    "prototype_contrastive_loss",
    "class_moments",
    "upsampled_cross_entropy",
    "upsampled_prediction",
    "prototype_logits",
    "upsampled_confusion",
    "upsampled_binary_cross_entropy",
    "balance_",
)
NAMES = catalog.names(catalog.BACKENDS)


@functools.cache
def _load(backend: str) -> Backend | str:
    """The backend's module, or the reason why it is not there."""
    home = catalog.find(catalog.BACKENDS, backend).home
    try:
        return cast("Backend", catalog.load(home))
    except ImportError as error:
        return f"{home} does not import: {error}"


def module(backend: str) -> Backend:
    """The loaded module of a backend that `pick` has named."""
    return cast(Backend, _load(backend))


def why_not(backend: str, ask: Ask) -> str | None:
    """None where `backend` can do what is asked, else the reason."""
    loaded = _load(backend)
    return loaded if isinstance(loaded, str) else loaded.why_not(ask)


@functools.cache
def order(device: str) -> tuple[str, ...]:
    """The backends that are tried on a device of this type where nothing was measured; the reference, which can do everything, is last."""
    return tuple(row.name for row in catalog.BACKENDS if device in row.devices and row.name != "reference") + (
        "reference",
    )


def pick(ask: Ask, backend: str | None) -> str:
    """The backend to use: the one asked for by name, or by SPCL_FAST_BACKEND, or the fastest usable one.

    The same arguments have the same answer for as long as the process lives, so that a backward takes the backend of its forward. Raises
    ValueError for an unknown name and RuntimeError, with the reason, where the one asked for cannot do it: there is no fallback.
    """
    backend = backend or os.environ.get("SPCL_FAST_BACKEND")
    if not backend:
        device = ask.device.type
        tried = (*measured.order(ask), *order(device)) if device == "cuda" else order(device)
        return next(name for name in tried if name == "reference" or why_not(name, ask) is None)
    if backend not in NAMES:
        where = " (of SPCL_FAST_BACKEND)" if backend == os.environ.get("SPCL_FAST_BACKEND") else ""
        raise ValueError(f"{ask.op}: unknown backend {backend!r}{where}; expected one of {', '.join(NAMES)}")
    reason = why_not(backend, ask)
    if reason is not None:
        raise RuntimeError(f"{ask.op}: backend {backend!r} was asked for and cannot be used: {reason}")
    return backend


def choose(ask: Ask, backend: str) -> Backend:
    """The module of `pick`; "" for no name."""
    return module(pick(ask, backend or None))


def origin_of_choice(op: str, device: torch.device) -> str | None:
    """Where the choice of a backend comes from on this GPU; None on a device whose order is fixed."""
    return measured.origin(op, device, order("cuda")[0]) if device.type == "cuda" else None


def _usual(op: str, device: torch.device) -> Ask:
    """What is meant where no tensors are given."""
    return Ask(op, device, torch.float32, num_classes=19, dim=256)


def available_backends(device: torch.device | str | None = None) -> dict[str, dict[str, str | None]]:
    """{op: {backend: None if usable, else the reason}} for float32 tensors on `device` (default: the GPU if there is one)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {op: {backend: why_not(backend, _usual(op, device)) for backend in NAMES} for op in OPS}


def taken(op: str, device: torch.device) -> str:
    """The backend that a large float32 problem with 19 classes takes where none is asked for by name."""
    return pick(_usual(op, device), None)
