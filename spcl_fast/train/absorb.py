"""SGD whose gradients vanish into the momentum as they arrive.

With v the momentum, m its factor and d the weight decay, a step is v <- m v + d w + g, w <- w - lr v. The gradient g of a step is a sum
over its backwards (one a domain and part), and v is linear in it: so every backward adds its share to v as soon as a parameter has it, and
one gradient is alive at a time instead of all. The result is that of `torch.optim.SGD` up to the order of three additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import distributed


class AbsorbingSGD(torch.optim.SGD):
    """`torch.optim.SGD` with momentum, its state dict too; after a backward `p.grad` of its parameters is None.

    Saves the gradients of all parameters but the largest; costs a few small kernels a parameter in each backward. On several processes
    the momenta are averaged instead of the gradients, which is the same: v is linear in g.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=False)
        self._touched: dict[Tensor, None] = {}  # parameters that have had a gradient in this step, in a fixed order
        self._taking_part: list[bool] | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                parameter.register_post_accumulate_grad_hook(self._absorb_of(group))

    def _absorb_of(self, group: dict[str, Any]) -> Callable[[Tensor], None]:
        def absorb(parameter: Tensor) -> None:
            if parameter not in self._touched:
                self._begin(parameter, group)
            self.state[parameter]["momentum_buffer"].add_(parameter.grad)
            parameter.grad = None

        return absorb

    @torch.no_grad()
    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """v <- m v + d w, once per step."""
        self._touched[parameter] = None
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:  # restored from a run of plain SGD that never had a gradient for it
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(parameter, alpha=group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self._average()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._touched:
                    parameter.add_(self.state[parameter]["momentum_buffer"], alpha=-group["lr"])
        self._touched.clear()

    def _average(self) -> None:
        """Which parameters take part is agreed upon at the first step: no process may average what another one does not have."""
        if distributed.world_size() == 1:
            return
        own = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        if self._taking_part is None:
            everywhere = distributed.gather_objects([parameter in self._touched for _, parameter in own])
            self._taking_part = [any(flags) for flags in zip(*everywhere, strict=True)]
        taking_part = [pair for pair, wanted in zip(own, self._taking_part, strict=True) if wanted]
        for group, parameter in taking_part:
            if parameter not in self._touched:
                self._begin(parameter, group)
        if len(taking_part) != len(self._touched):
            raise RuntimeError("a parameter has a gradient now but had none at the first step on any process")
        distributed.all_reduce_(
            [self.state[parameter]["momentum_buffer"] for _, parameter in taking_part], average=True
        )
