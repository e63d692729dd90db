"""The dtypes of labels and the memory layouts of maps that the ops read in place."""

from __future__ import annotations

import torch

LABEL_DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
LAYOUTS = ["nchw", "channels_last", "transposed", "cropped", "every_other"]
MORE_LAYOUTS = [*LAYOUTS, "misaligned", "every_other_image"]


def laid_out(features: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other strides; what lies between them is NaN."""
    batch, dim, height, width = features.shape
    if layout == "channels_last":
        return features.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return features.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "cropped":
        room = torch.full((batch, dim + 1, height + 2, width + 3), torch.nan, dtype=features.dtype)
        room[:, 1:, 1:-1, 2:-1] = features
        return room[:, 1:, 1:-1, 2:-1]
    if layout == "every_other":
        room = torch.full((batch, 2 * dim, height, 2 * width), torch.nan, dtype=features.dtype)
        room[:, ::2, :, ::2] = features
        return room[:, ::2, :, ::2]
    if layout == "misaligned":
        return torch.cat([features.new_zeros(1), features.flatten()])[1:].view(features.shape)
    if layout == "every_other_image":
        return features.repeat_interleave(2, 0)[::2]
    return features


def as_rows(maps: torch.Tensor) -> torch.Tensor:
    """[B, D, h, w] as [B * h * w, D]."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
