"""Inputs of the ops: random features, labels in blocks as label maps have them, a tenth of the blocks ignored. Never zeros."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


def blocks_of_labels(
    batch: int, height: int, width: int, num_classes: int, generator: torch.Generator, dtype: torch.dtype = torch.uint8
) -> Tensor:
    """[batch, height, width] in blocks of 8 x 8; the first block always has a class."""
    shape, here = (batch, height // 8 + 1, width // 8 + 1), {"generator": generator, "device": generator.device}
    blocks = torch.randint(0, num_classes, shape, **here)
    ignored = torch.rand(shape, **here) < 0.1
    ignored[:, 0, 0] = False
    blocks = blocks.masked_fill(ignored, IGNORE)
    return blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].to(dtype).contiguous()


def contrast_problem(
    shape: tuple[int, int, int, int],
    num_classes: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """features [B, D, h, w], labels [B, h, w] (uint8, or int64 beyond 255 classes), unit prototypes [K, D] float32."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, dim, height, width = shape
    features = torch.randn(shape, generator=generator, device=device).to(dtype)
    label_dtype = torch.uint8 if num_classes <= IGNORE else torch.int64
    labels = blocks_of_labels(batch, height, width, num_classes, generator, label_dtype)
    prototypes = F.normalize(torch.randn(num_classes, dim, generator=generator, device=device), dim=1)
    return features, labels, prototypes


def upsampling_problem(
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """logits [B, K, h, w], labels uint8 [B, H, W]."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=generator, device=device)).to(dtype)
    return logits, blocks_of_labels(shape[0], *size, shape[1], generator)
