"""What a formula of PyTorch's operations moves: every operation reads its inputs and writes its outputs, views are free.

with eager.counted() as total: ...     # total.bytes, total.operations
"""

from __future__ import annotations

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class counted(TorchDispatchMode):  # noqa: N801 - reads as the function it stands for
    """Adds up bytes while it is entered. A tensor that is expanded counts as what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [tensor for tensor in pytree.tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        made = [tensor for tensor in pytree.tree_leaves(out) if isinstance(tensor, Tensor)]
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        inplace = function._schema.is_mutable
        if inplace or any(tensor.untyped_storage().data_ptr() not in storages for tensor in made):
            self.operations += 1
            self.bytes += sum(map(_held, given)) + sum(map(_held, made))
        return out


def _held(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()
