"""A net's body as a chain of blocks, of which segments can be forgotten in the forward pass and recomputed in the backward.

Of a recomputed segment only its inputs stay alive. The last segment is never recomputed: the backward begins with it, so its intermediate
results would be freed and made again at once. Source: Chen et al., arXiv 1604.06174.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

State = tuple[Tensor, ...]  # what goes from block to block
Block = Callable[..., Tensor | State]


class Chain(nn.Module):
    """A module whose forward is `blocks()`, one after another. `cuts`: at which blocks a new segment begins; none: nothing is recomputed.

    It costs at most one more forward of the segments before the last cut, and keeps of them the inputs of the segments alone. Running
    statistics of BatchNorm move once, dropout draws the same numbers again: the results are bit for bit those of a plain forward.
    """

    cuts: tuple[int, ...] = ()

    def blocks(self) -> list[Block]:
        raise NotImplementedError

    def stages(self) -> tuple[int, ...]:
        """The blocks at which the size of the maps or their number of channels changes: where `checkpoint: stage` cuts."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        blocks, state = self.blocks(), (x,)
        if not (self.cuts and torch.is_grad_enabled()):
            return run_blocks(blocks, state)[0]
        for begin, end in itertools.pairwise((0, *(cut for cut in self.cuts if 0 < cut < len(blocks)), len(blocks))):
            last = end == len(blocks)
            state = run_blocks(blocks[begin:end], state) if last else self._recomputed(blocks[begin:end], state)
        return state[0]

    def _recomputed(self, blocks: Sequence[Block], state: State) -> State:
        return checkpoint(
            lambda *given: run_blocks(blocks, given),
            *state,
            use_reentrant=False,
            preserve_rng_state=any(
                isinstance(module, _DropoutNd) for module in self.modules()
            ),  # reading it waits for a GPU
            context_fn=lambda: (contextlib.nullcontext(), statistics_kept(self)),
        )


def run_blocks(blocks: Sequence[Block], state: State) -> State:
    """One block after another; what a block returns are the arguments of the next."""
    for block in blocks:
        out = block(*state)
        state = out if isinstance(out, tuple) else (out,)
    return state


@contextlib.contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """A second forward of the same images inside must not move the running statistics of BatchNorm a second time."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
