"""Problems, shapes and backends for the tests of the ops, each in one place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from spcl_fast import backends, catalog
from spcl_fast.backends.contract import Ask


def asked(op: str, *needs: str, device: str | torch.device = "cpu", dtype=torch.float32, num_classes=5, dim=16) -> Ask:
    """What a test of `op` asks a backend for."""
    return Ask(op, torch.device(device), dtype, num_classes, dim, needs=frozenset(needs))


ON_CPU = tuple(row.name for row in catalog.BACKENDS if "cpu" in row.devices)


def usable(op: str, *needs: str, among: tuple[str, ...] = ON_CPU) -> list[str]:
    """The backends, of `among`, that can do `op` with these options on this machine's CPU."""
    return [name for name in among if backends.why_not(name, asked(op, *needs)) is None]


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spcl_fast":
            self.seen.append((func, pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args), kwargs or {}))
        return func(*args, **(kwargs or {}))


def check_ops(call: Callable[[], object], *tests: str) -> None:
    """torch.library.opcheck of each op that `call` dispatches, with the arguments that it has there; all of its checks by default."""
    with _Calls() as calls:
        call()
    assert calls.seen, "nothing of ours was called"
    for op, args, kwargs in calls.seen:
        torch.library.opcheck(op, args, kwargs, **({"test_utils": tests} if tests else {}))
