"""SwAV (Caron et al., arXiv 2006.09882): each crop predicts the balanced assignment of another crop of its image.

q = Sinkhorn of <f_n, P_k> / epsilon: rows sum to 1, columns to N/K           f: the crop that is assigned, a constant
loss = mean over assigned crops i and other crops v of  - sum over k of q_nk log softmax over k of <x_n, P_k> / temperature
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..estimators.moving import is_distributed
from ..ops import dispatched
from .capi import balanced_block
from .views import SCORES, is_for_blocks, views_loss


class SwAVLoss(nn.Module):
    """Mean over assigned crops i and other crops v of the cross-entropy of v's softmax against i's balanced assignment.

    forward(crops, each [N, D]; prototypes [K, D]; queues=None) -> [].
    temperature 0.1, epsilon 0.05, iterations 3, crops_for_assign (0, 1): the authors' defaults. With torch.distributed initialised the
    balance is over all ranks. Memory: O(N D + K), the gradients, and on the CPU blocks of 4 MB: more of the [N, K] scores
    and of the assignment is never there.
    Prototypes are used as they are: the authors normalise them, in place, before each step.
    Source: `train` and `distributed_sinkhorn` in main_swav.py of facebookresearch/swav, arXiv 2006.09882.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        crops_for_assign: Sequence[int] = (0, 1),
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not crops_for_assign:
            raise ValueError("SwAVLoss: crops_for_assign must name at least one crop")
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.crops_for_assign, self.backend = tuple(crops_for_assign), backend

    def forward(self, crops: Sequence[Tensor], prototypes: Tensor, queues: Sequence[Tensor] | None = None) -> Tensor:
        """crops of [N, D], normalised features; prototypes [K, D]; queues: for each assigned crop earlier features [Q, D], which take part
        in the balance and in nothing else."""
        if len(crops) < 2 or max(self.crops_for_assign) >= len(crops):
            raise ValueError(
                f"SwAVLoss: {len(crops)} crops, but {list(self.crops_for_assign)} are to be assigned to the others"
            )
        targets = [
            self.targets(crops[index], prototypes, None if queues is None else queues[place])
            for place, index in enumerate(self.crops_for_assign)
        ]
        predicts = [
            [place for place, index in enumerate(self.crops_for_assign) if index != v] for v in range(len(crops))
        ]
        return views_loss(
            "SwAVLoss", crops, targets, predicts, prototypes, temperature=self.temperature, backend=self.backend
        )  # fmt: skip

    @dispatched.ignores_autocast
    def targets(self, crop: Tensor, prototypes: Tensor, queue: Tensor | None = None) -> ops.TeacherTargets:
        """The balanced assignment of a crop, computed where it is used."""
        features, heads = crop.detach(), prototypes.detach()
        balanced = features if queue is None else torch.cat([queue.to(features.dtype), features])
        is_small = 0 < len(balanced) * len(heads) <= SCORES  # then one product, not two per iteration
        if is_small and self.backend is None and is_for_blocks(features) and not is_distributed():
            kind = torch.float64 if features.dtype == torch.float64 else torch.float32
            scores = balanced.to(kind) @ heads.to(kind).t()
            _, u, v = balanced_block(scores.div_(self.epsilon)[None], self.iterations)
            u, v = u.flatten(), v.flatten()
        else:
            settings = {"temperature": self.epsilon, "iterations": self.iterations, "backend": self.backend}
            u, v = ops.balance_(balanced, heads, **settings)
        return ops.TeacherTargets(features, heads, self.epsilon, u[len(balanced) - len(features) :], v)
