"""What an op refuses, in words that say what was given and what was expected. Shapes and dtypes only: nothing here reads a value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
REDUCTIONS = ("mean", "sum", "none")


def check_float(op: str, name: str, tensor: Tensor, dims: tuple[int, ...], layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {layout}, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    check_strided(op, name, tensor)
    if tensor.dim() not in dims:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {list(tensor.shape)}")


def check_strided(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {str(tensor.layout).removeprefix('torch.')}")


def check_labels_tensor(op: str, labels: Tensor, dims: int, layout: str, name: str = "labels") -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: {name} must be an integer tensor {layout}, got {type(labels).__name__}")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{op}: {name} must have an integer dtype, got {labels.dtype}")
    check_strided(op, name, labels)
    if labels.dim() != dims:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {list(labels.shape)}")


def check_pixels(op: str, features: Tensor, labels: Tensor) -> None:
    """features [B, D, h, w] with labels [B, H, W], or [N, D] with [N]."""
    check_float(op, "features", features, (2, 4), "[B, D, h, w] or [N, D]")
    if features.dim() == 2:
        check_labels_tensor(op, labels, 1, "[N] for features [N, D]")
    else:
        check_labels_tensor(op, labels, 3, "[B, H, W] for features [B, D, h, w]")
        if features.shape[0] and 0 in labels.shape[1:] and 0 not in features.shape[2:]:
            raise ValueError(f"{op}: labels must hold at least one pixel an image, got shape {list(labels.shape)}")
    if labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"{op}: features and labels must agree in their first dimension, got {list(features.shape)} and {list(labels.shape)}"
        )
    if features.shape[1] == 0:
        raise ValueError(f"{op}: features must have at least one channel, got shape {list(features.shape)}")
    check_device(op, features, "features", labels=labels)


def check_device(op: str, anchor: Tensor, anchor_name: str, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != anchor.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and {anchor_name} on {anchor.device}; expected one device"
            )


def check_temperature(op: str, temperature: float) -> None:
    if isinstance(temperature, Tensor) or not isinstance(temperature, (int, float)):
        raise TypeError(f"{op}: temperature must be a number, got {type(temperature).__name__}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{op}: temperature must be finite and above 0, got {temperature}")


def check_options(op: str, *, ignore_index: int, backend: str | None, **flags: bool) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: ignore_index must fit 64 bits, got {ignore_index}")
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"{op}: backend must be a name or None, got {type(backend).__name__}")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {flag!r}")


def check_reduction(op: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_constant(op: str, name: str, tensor: Tensor | None, shapes: tuple[tuple[int, ...], ...], what: str) -> None:
    """A weight: floating, one of the shapes, and not to be differentiated."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}"
        )
    if tuple(tensor.shape) not in shapes:
        raise ValueError(
            f"{op}: {name} must have {what}, got shape {list(tensor.shape)}, expected {' or '.join(str(list(s)) for s in shapes)}"
        )
    if tensor.requires_grad:
        raise ValueError(f"{op}: {name} requires grad, but is a constant of the loss; pass {name}.detach()")
