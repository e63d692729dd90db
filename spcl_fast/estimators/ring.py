"""Pixels of each label, evenly spaced in the order of pixels, and the rings that remember them. No host sync, nothing is drawn."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from .assignment import NONE


class SampledPixels(NamedTuple):
    values: Tensor  # [R, samples, D] of the features' dtype; any pixel where a label has fewer
    labels: Tensor  # [R, samples] int64, NONE where a label has fewer
    counts: Tensor  # [R] int64: pixels of each label in the batch


def sampled_pixels(features: Tensor, labels: Tensor, number: int, samples: int) -> SampledPixels:
    """Up to `samples` pixels of each label in [0, number). features [B, D, h, w], labels [B, h, w] (-1: none). Differentiable."""
    flat = labels.flatten()
    order = flat.argsort(stable=True)
    counts = counted(labels, number)
    first = (flat < 0).sum() + counts.cumsum(0) - counts
    step = torch.arange(samples, device=flat.device)
    which = torch.where(counts[:, None] > samples, _evenly_spaced(counts, samples), step)  # [R, samples]
    pixel = order[(first[:, None] + which).clamp(0, max(len(order) - 1, 0))]
    height, width = features.shape[2:]
    image, line, column = pixel // (height * width), pixel // width % height, pixel % width
    values = features[image, :, line, column]
    own = torch.arange(number, device=flat.device)[:, None].expand(number, samples)
    return SampledPixels(values, own.masked_fill(step >= counts[:, None], NONE), counts)


@torch.no_grad()
def enqueue_(
    queue: Tensor, queue_next: Tensor, features: Tensor, labels: Tensor, max_samples: int, *, normalize: bool = True
) -> Tensor:
    """Up to `max_samples` pixels of each label into its ring [R, memory, D]; queue_next [R] says where it goes on -> how many [R].

    features [B, D, h, w], labels [B, h, w] (-1: none).
    """
    samples = min(max_samples, queue.shape[1])
    found = sampled_pixels(features, labels, len(queue), samples)
    values = found.values.to(queue.dtype)
    values = F.normalize(values, dim=-1) if normalize else values
    step = torch.arange(samples, device=queue.device)
    home = torch.arange(len(queue), device=queue.device)[:, None], (queue_next[:, None] + step) % queue.shape[1]
    queue[home] = torch.where((found.labels != NONE)[..., None], values, queue[home])
    taken = found.counts.clamp_max(samples)
    queue_next.copy_((queue_next + taken) % queue.shape[1])
    return taken


def _evenly_spaced(counts: Tensor, samples: int) -> Tensor:
    """torch.linspace(0, count - 1, samples, dtype=int64) for each count: [R, samples]; its second half is counted from the end."""
    index = torch.arange(samples, device=counts.device, dtype=torch.float64)
    last = (counts - 1).double()[:, None]
    step = last / max(samples - 1, 1)
    from_end = last - step * (samples - 1 - index)
    return torch.where((index < samples // 2) | (samples == 1), step * index, from_end).long()


def counted(labels: Tensor, number: int) -> Tensor:
    """[number] int64: pixels of each label; -1 and beyond are left out."""
    home = torch.where((labels >= 0) & (labels < number), labels, number).flatten()
    return torch.zeros(number + 1, dtype=torch.int64, device=labels.device).scatter_add_(
        0, home, torch.ones_like(home)
    )[:number]


def over_ranks(values: Tensor) -> Tensor:
    """The values of all ranks along the first dimension; each rank must have as many."""
    if distributed.world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(distributed.world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)
