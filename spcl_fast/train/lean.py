"""The net as a step calls it: precision, recomputation and offload of what the backward needs, by `LoopConfig`.

What each setting saves and costs is in docs/memory.md.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import LoopConfig
from ..errors import ConfigError
from ..models import SegmentationModel
from ..models.chain import Chain, run_blocks, statistics_kept
from . import memory
from .device import Precision

_OFFLOADED_BYTES = 1 << 20  # smaller tensors stay where they are: copying them costs more than they hold


class LeanModel:
    """Forward of a net with the settings of the loop. One call at a time has a graph alive: go backward before the next."""

    def __init__(self, model: SegmentationModel, precision: Precision, *, offload: bool = False) -> None:
        self.model, self.precision, self.offload = model, precision, offload
        self._grids: dict[tuple[int, ...], tuple[int, int]] = {}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """-> features [B, D, h, w], logits [B, K, h, w]."""
        with self._forward():
            return self.model(images)

    def features(self, images: Tensor) -> Tensor:
        with self._forward():
            return self.model.features(images)

    def classify(self, features: Tensor) -> Tensor:
        """Logits of features that were computed before."""
        with self.precision.autocast():
            return self.model.classify(features)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Height and width of the features of such images; one forward for a size that was not seen before."""
        size = tuple(images.shape[2:])
        if size not in self._grids:
            with torch.no_grad(), statistics_kept(self.model):
                height, width = self.features(images[:1]).shape[2:]
            self._grids[size] = height, width
        return self._grids[size]

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        with (
            self.precision.autocast(),
            offloaded(self.model) if self.offload else contextlib.nullcontext(),
            memory.phase("forward"),
        ):
            yield


def lean_model(
    model: SegmentationModel, settings: LoopConfig, precision: Precision, shapes: Sequence[tuple[int, ...]]
) -> LeanModel:
    """`model` with the loop's settings; `shapes`: of the images that it will see, for `checkpoint: auto`. Raises ConfigError."""
    chain = model.chain
    if settings.checkpoint != "none" and chain is None:
        raise ConfigError(
            f"loop.checkpoint: {model.name} is not made of blocks (models/chain.py), so nothing can be recomputed: use none."
        )
    if chain is not None:
        chain.cuts = _cuts(model, chain, settings.checkpoint, precision, shapes)
    if settings.compile:
        model.feature_extractor.compile()
    if settings.offload and precision.device.type != "cuda":
        raise ConfigError(
            f"loop.offload: the net is on {precision.device}, whose memory is the host's already; leave it out."
        )
    return LeanModel(model, precision, offload=settings.offload)


def _cuts(
    model: SegmentationModel, chain: Chain, checkpoint: str, precision: Precision, shapes: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
    if checkpoint == "none":
        return ()
    if checkpoint == "stage":
        return chain.stages()
    if checkpoint == "block":
        return tuple(range(1, len(chain.blocks())))
    return best_cuts(block_bytes(model, precision, max(shapes, key=lambda shape: shape[0] * shape[-1] * shape[-2])))


# ---- where to cut --------------------------------------------------------------------------------------------------------------------


def block_bytes(model: SegmentationModel, precision: Precision, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(bytes of its input, bytes that it keeps for the backward) of every block, from fake tensors: nothing is computed or allocated."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    chain = model.chain
    assert chain is not None  # lean_model has asked
    own = {id(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}
    result: list[tuple[int, int]] = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), precision.autocast(), statistics_kept(model):
        state: tuple[Tensor, ...] = (torch.empty(shape, device=model.mean.device),)
        for block in chain.blocks():
            seen = {_storage(tensor) for tensor in state}
            kept: dict[int, int] = {}

            def pack(tensor: Tensor, kept: dict[int, int] = kept, seen: set[int] = seen) -> Tensor:
                if id(tensor) not in own and _storage(tensor) not in seen:
                    kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
                return tensor

            held = sum(tensor.nbytes for tensor in state)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                state = run_blocks([block], state)
            result.append((held, sum(kept.values())))
    return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def best_cuts(blocks: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The cuts with the smallest peak: while a segment is in its backward, the inputs of it and of those before it are alive, and what its
    own blocks keep. Found by bisection on that peak; for each, the least memory held at a cut before block j follows from that at earlier
    ones.
    """
    low, high = 0, sum(held for held, _ in blocks) + sum(kept for _, kept in blocks)
    best: tuple[int, ...] = ()
    while low < high:
        limit = (low + high) // 2
        cuts = _cuts_within(blocks, limit)
        if cuts is None:
            low = limit + 1
        else:
            best, high = cuts, limit
    return best


def _cuts_within(blocks: Sequence[tuple[int, int]], limit: int) -> tuple[int, ...] | None:
    """Cuts whose peak is at most `limit` bytes, or None."""
    held: list[float] = [blocks[0][0]]  # at a cut before block j, with the best earlier cuts
    before: list[int] = [0]
    for j in range(1, len(blocks) + 1):
        own = blocks[j][0] if j < len(blocks) else 0
        fits = [i for i in range(j) if held[i] + sum(kept for _, kept in blocks[i:j]) <= limit]
        start = min(fits, key=lambda i: held[i], default=-1)
        held.append(held[start] + own if fits else float("inf"))
        before.append(start)
    if held[-1] == float("inf"):
        return None
    cuts, at = [], before[-1]
    while at > 0:
        cuts.append(at)
        at = before[at]
    return tuple(reversed(cuts))


# ---- offload -------------------------------------------------------------------------------------------------------------------------


class _Host:
    """A tensor in the host's memory, and where it belongs."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.storage = weakref.ref(tensor.untyped_storage())  # its address may belong to another tensor later
        with memory.phase("host"):
            self.tensor = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self.tensor.copy_(tensor, non_blocking=tensor.is_cuda)

    def back(self) -> Tensor:
        return torch.empty_like(self.tensor, device=self.device, pin_memory=False).copy_(self.tensor, non_blocking=True)


def offloaded(model: SegmentationModel) -> torch.autograd.graph.saved_tensors_hooks:
    """Inside, what the backward needs of a forward goes to the host; parameters and small tensors stay, what several layers keep is copied
    once. Costs two copies over the bus for each byte saved, on the stream of the computation.
    """
    stays = {_storage(parameter) for parameter in model.parameters()}
    copies: weakref.WeakValueDictionary[tuple[Any, ...], _Host] = weakref.WeakValueDictionary()

    def pack(tensor: Tensor) -> Tensor | _Host:
        if tensor.nbytes < _OFFLOADED_BYTES or _storage(tensor) in stays:
            return tensor
        key = (_storage(tensor), tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride())
        copy = copies.get(key)
        if copy is None or copy.storage() is not tensor.untyped_storage():
            copy = copies[key] = _Host(tensor)
        return copy

    def unpack(saved: Tensor | _Host) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved.back()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
