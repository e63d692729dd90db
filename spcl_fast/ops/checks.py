"""What an op refuses, with what was given and what was expected. Shapes and dtypes only: nothing here reads a value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
IGNORE_INDEX = 255  # the ops' default
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
    # torch.compile takes no question for a layout inside of a backward
    if not torch.compiler.is_compiling() and tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {str(tensor.layout).removeprefix('torch.')}")


def check_labels_tensor(op: str, labels: Tensor, dims: int, layout: str, name: str = "labels") -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: {name} must be an integer tensor {layout}, got {type(labels).__name__}")
    if labels.dtype not in INTEGERS and labels.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must have an integer dtype, got {labels.dtype}")
    check_strided(op, name, labels)
    if labels.dim() != dims:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {list(labels.shape)}")


def check_logits(op: str, logits: Tensor) -> None:
    check_float(op, "logits", logits, (4,), "[B, K, h, w]")
    if 0 in logits.shape[1:]:
        raise ValueError(f"{op}: logits must hold at least one class and one node, got shape {list(logits.shape)}")


def check_size(op: str, size: tuple[int, int]) -> None:
    if not isinstance(size, (tuple, list)):
        raise TypeError(f"{op}: size must be (H, W), got {size!r}")
    if any(isinstance(value, float) for value in size):
        raise TypeError(f"{op}: size must be (H, W) in whole pixels, got {tuple(size)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{op}: size must be (H, W), each at least 1, got {tuple(size)}")


def check_device(op: str, anchor: Tensor, anchor_name: str, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != anchor.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and {anchor_name} on {anchor.device}; expected one device"
            )


def as_integers(labels: Tensor) -> Tensor:
    """Masks of True and False are classes 1 and 0."""
    return labels.view(torch.uint8) if labels.dtype == torch.bool else labels


def is_fake(values: Tensor) -> bool:
    """Whether there are no values to look at: the memory plan runs on such tensors."""
    return isinstance(values, torch._subclasses.FakeTensor)


def has_values(values: Tensor) -> bool:
    """Whether a Python number can be had of a tensor: no tracer, no transform of torch.func."""
    return not (
        torch.compiler.is_compiling()
        or is_fake(values)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def wide(values: Tensor) -> torch.dtype:
    """The dtype of losses and weights."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def check_temperature(op: str, temperature: float) -> None:
    if isinstance(temperature, (Tensor, bool)) or not isinstance(temperature, (int, float)):
        raise TypeError(f"{op}: temperature must be a number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:  # not isfinite, which a compiled step with a number of its own breaks at
        raise ValueError(f"{op}: temperature must be finite and above 0, got {temperature}")


def check_share(op: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {value}")


def check_finite(op: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices[:-1]))
        raise ValueError(f"{op}: {name} must be {listed} or {choices[-1]!r}, got {value!r}")


def refuse_together(op: str, first: str, second: str, reason: str) -> None:
    """For two options that mean nothing together."""
    raise ValueError(f"{op}: {first} and {second} cannot be used together: {reason}")


def refuse_ignored_class(op: str, soft: str, ignore_index: int) -> None:
    """A class to be ignored where the labels are none. As torch, which takes a negative number there: it names no class."""
    if ignore_index >= 0 and ignore_index != IGNORE_INDEX:
        refuse_together(op, soft, f"ignore_index={ignore_index}", "a pixel is left out by probabilities that are all 0")


def scale_of(op: str, anchor: Tensor, temperature: float | Tensor) -> float | Tensor:
    """A checked temperature; a tensor stays on its device, in the losses' dtype, and is read on the CPU alone, where nothing waits."""
    if not isinstance(temperature, Tensor):
        check_temperature(op, temperature)
        return float(temperature)
    if temperature.dtype not in FLOATS or temperature.dim():
        raise TypeError(
            f"{op}: temperature must be a number or a floating-point tensor of shape [], got {temperature.dtype} of shape "
            f"{list(temperature.shape)}"
        )
    check_device(op, anchor, "features", temperature=temperature)
    if temperature.device.type == "cpu" and has_values(temperature):
        check_temperature(op, float(temperature.detach()))
    return temperature.to(wide(anchor))


def denominator_of(
    op: str, denominator: str | Tensor, reduction: str, like: Tensor, grid: tuple[int, ...]
) -> Tensor | None:
    """What "mean" divides by, [] in the losses' dtype; None: what the labels say."""
    if not isinstance(denominator, Tensor):
        check_choice(op, "denominator", denominator, ("labelled", "all"))
        if denominator == "labelled":
            return None
    if reduction != "mean":
        refuse_together(op, f"denominator={denominator if isinstance(denominator, str) else 'a tensor'}",
                        f"reduction={reduction!r}", "only the mean is divided")  # fmt: skip
    if not isinstance(denominator, Tensor):
        return like.new_full((), math.prod(grid), dtype=wide(like))
    if denominator.dim():
        raise ValueError(f"{op}: denominator must be a tensor of shape [], got {list(denominator.shape)}")
    if denominator.requires_grad:
        raise ValueError(f"{op}: denominator requires grad, but is a constant of the loss; pass denominator.detach()")
    check_device(op, like, "features", denominator=denominator)
    return denominator.to(wide(like))


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


def _same(shape: torch.Size, other: tuple[int, ...]) -> bool:
    """Size by size: a tuple of traced sizes is in no list of tuples."""
    return len(shape) == len(other) and all(a == b for a, b in zip(shape, other, strict=True))


def check_constant(op: str, name: str, tensor: Tensor | None, shapes: tuple[tuple[int, ...], ...], what: str) -> None:
    """A weight: floating, one of the shapes, and not to be differentiated."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}"
        )
    if not any(_same(tensor.shape, shape) for shape in shapes):
        raise ValueError(
            f"{op}: {name} must have {what}, got shape {list(tensor.shape)}, expected {' or '.join(f'{list(s)}' for s in shapes)}"
        )
    if tensor.requires_grad:
        raise ValueError(f"{op}: {name} requires grad, but is a constant of the loss; pass {name}.detach()")
