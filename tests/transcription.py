"""A loss next to its formula, written plainly: equal in float64, and in float32 as accurate as the formula is there."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import torch
from torch import Tensor

TEMPERATURES = (0.05, 1.0, 100.0)
Loss = Callable[..., Tensor]


def with_gradients(loss: Loss, leaves: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The loss's value for leaves of this dtype, then each leaf's gradient. A loss of many values gets an uneven incoming gradient."""
    given = {name: leaf.detach().to(dtype).clone().requires_grad_() for name, leaf in leaves.items()}
    value = loss(**given)
    value.backward(torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape) if value.dim() else None)
    missing = [name for name, leaf in given.items() if leaf.grad is None]
    assert not missing, f"no gradient in {missing}"
    return value.detach(), *(leaf.grad for leaf in given.values())


def assert_equals(ours: Loss, plain: Loss, *, slack: float = 16, **leaves: Tensor) -> None:
    """`ours(**leaves)` and `plain(**leaves)` in value and in the gradient of every leaf.

    `plain` is the formula in plain PyTorch, in the dtype of what it is given.
    """
    truth = with_gradients(plain, leaves, torch.float64)
    names = ("value", *(f"gradient of {name}" for name in leaves))
    for name, got, true in zip(names, with_gradients(ours, leaves, torch.float64), truth, strict=True):
        assert got.dtype == torch.float64 and got.shape == true.shape, name
        error = (got - true).abs().max().item()
        assert error <= 1e-9 * max(true.abs().max().item(), 1e-12), f"{name} in float64: off by {error}"
    eager = with_gradients(plain, leaves, torch.float32)
    for got, own, true in zip(with_gradients(ours, leaves, torch.float32), eager, truth, strict=True):
        oracle.assert_as_accurate(got, own, true, slack=slack)
