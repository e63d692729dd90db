"""What a stage trains: modules and optimisers, as one thing that can be saved, restored, reduced over processes and updated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_copy_,  # pyright: ignore[reportPrivateImportUsage] # torch.optim's own, and there is no public one
    nn,
)
from torch.optim import Optimizer

from .. import distributed
from ..runs.statetree import flatten, unflatten
from .absorb import AbsorbingSGD

_OPTIMIZER = "optimizer-"


class TrainingState:
    """Modules and optimisers by name. A group's learning rate on entry is its base rate."""

    def __init__(self, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> None:
        self.modules, self.optimizers = dict(modules), dict(optimizers)
        clash = [name for name in modules if name.startswith(_OPTIMIZER)]
        if clash:
            raise ValueError(f"module names must not begin with {_OPTIMIZER!r}: {clash}")
        self._base = {
            name: [float(group["lr"]) for group in optimizer.param_groups] for name, optimizer in optimizers.items()
        }
        # those that no optimiser owns too: their gradients would grow without end
        self._every_parameter = list({id(p): p for module in modules.values() for p in module.parameters()}.values())
        self._every_parameter += [p for _, p in self._parameters()]
        self._buffers = list({id(b): b for module in modules.values() for b in module.buffers()}.values())
        self._kept: list[Tensor] = []
        self._with_gradient: list[bool] | None = None
        self._clear_gradients()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by `file/name`; no copies."""
        result = {
            f"{name}/{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        wrong = [key for key, value in result.items() if not isinstance(value, Tensor)]
        if wrong:
            raise TypeError(f"module state that is not a tensor cannot be saved: {wrong}; register it as a buffer")
        self._optimizer_trees(result)
        return result

    def optimizer_trees(self) -> dict[str, Any]:
        """The optimisers' state as JSON that refers to `tensors()`."""
        return self._optimizer_trees({})

    def _optimizer_trees(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {
            name: flatten(optimizer.state_dict(), tensors, f"{_OPTIMIZER}{name}/state")
            for name, optimizer in self.optimizers.items()
        }

    def restore(self, tensors: Mapping[str, Tensor], trees: Mapping[str, Any]) -> None:
        """Set modules and optimisers to a saved state, bit for bit.

        Raises CheckpointError, KeyError, RuntimeError or ValueError where it does not fit.
        """
        for name, module in self.modules.items():
            module.load_state_dict(
                {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + "/")}
            )
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(unflatten(trees[name], tensors))

    def share_initial(self) -> None:
        """Several processes: start from the modules of the first."""
        if distributed.world_size() == 1:
            return
        own = {
            f"{name}/{key}": value.detach().cpu()
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        shared = distributed.broadcast_tensors(own if distributed.is_main() else None)
        for name, module in self.modules.items():
            module.load_state_dict(
                {key[len(name) + 1 :]: value for key, value in shared.items() if key.startswith(name + "/")}
            )

    def set_rates(self, factor: float) -> None:
        """Every group's rate = its base rate times `factor`."""
        for name, optimizer in self.optimizers.items():
            for group, base in zip(optimizer.param_groups, self._base[name], strict=True):
                group["lr"] = base * factor

    def rate(self) -> float:
        """The rate of the first group of the first optimiser, for the log."""
        return next(
            (float(group["lr"]) for optimizer in self.optimizers.values() for group in optimizer.param_groups), 0.0
        )

    def reduce_gradients(self) -> None:
        """Average the gradients over the processes.

        Which parameters take part is agreed upon at the first step; afterwards a parameter without a gradient here counts as zero, and one
        that gets its first gradient later is an error: asking the others every step would make the CPU wait for the GPU.
        """
        if distributed.world_size() == 1:
            return
        parameters = self._parameters()
        if self._with_gradient is None:
            everywhere = distributed.gather_objects([p.grad is not None for _, p in parameters])
            self._with_gradient = [any(flags) for flags in zip(*everywhere, strict=True)]
        taking_part = []
        for (name, parameter), expected in zip(parameters, self._with_gradient, strict=True):
            if parameter.grad is not None and not expected:
                raise RuntimeError(f"parameter {name} has a gradient now but had none at the first step on any process")
            if expected:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                taking_part.append(parameter.grad)
        distributed.all_reduce_(taking_part, average=True)

    def update(self) -> None:
        """One step of every optimiser; the gradients are freed."""
        for optimizer in self.optimizers.values():
            optimizer.step()
        self._clear_gradients()

    def remember(self) -> None:
        """Keep what a step may change before its update: the buffers, all of them, as BatchNorm moves its own unseen by their version."""
        if not self._kept:
            self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        if self._buffers:
            _foreach_copy_(self._kept, self._buffers)

    def forget_step(self) -> bool:
        """After a step that failed before its update: drop its gradients, put the buffers back. -> whether the state is that before it.

        It is not where gradients were absorbed: the momenta hold parts of the step.
        """
        self._clear_gradients()
        if self._buffers:
            _foreach_copy_(self._buffers, self._kept)
        return not any(isinstance(optimizer, AbsorbingSGD) for optimizer in self.optimizers.values())

    def _clear_gradients(self) -> None:
        for parameter in self._every_parameter:
            parameter.grad = None

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The optimisers' parameters in their order, the same on every process."""
        return [
            (f"{name}.{i}.{j}", parameter)
            for name, optimizer in self.optimizers.items()
            for i, group in enumerate(optimizer.param_groups)
            for j, parameter in enumerate(group["params"])
        ]
