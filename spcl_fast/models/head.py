"""From the maps of a body to features of D channels at the finest of their sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import init_convs


class SkipHead(nn.Module):
    """A coarse map and a map of twice its size -> features of D channels at the finer size."""

    def __init__(self, skip_channels: int, deep_channels: int, feature_dim: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(skip_channels, feature_dim, 1, bias=False)
        self.deep = nn.Conv2d(deep_channels, feature_dim, 1, bias=False)
        self.norm = nn.GroupNorm(_groups(feature_dim), feature_dim)
        self.conv = nn.Conv2d(feature_dim, feature_dim, 3, padding=1)
        init_convs(self)

    def forward(self, skip: Tensor, deep: Tensor) -> Tensor:
        # Projected before it is up-sampled: 112 channels at stride 8 would cost as much as the head's 3x3 convolution.
        deep = _up(self.deep(deep), skip)
        return self.conv(F.relu(self.norm(self.skip(skip) + deep), inplace=True))


class FusedHead(nn.Module):
    """Any number of maps, the finest first -> features of D channels at its size: projected, up-sampled, added; GroupNorm, ReLU, 3x3."""

    def __init__(self, channels: Sequence[int], feature_dim: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(each, feature_dim, 1, bias=False) for each in channels)
        self.norm = nn.GroupNorm(_groups(feature_dim), feature_dim)
        self.conv = nn.Conv2d(feature_dim, feature_dim, 3, padding=1)
        init_convs(self)

    def forward(self, *maps: Tensor) -> Tensor:
        total = self.projections[0](maps[0])
        for projection, deep in zip(list(self.projections)[1:], maps[1:], strict=True):
            total = total + _up(projection(deep), total)
        return self.conv(F.relu(self.norm(total), inplace=True))


class JoinedMaps(nn.Module):
    """The maps as they are, up-sampled to the finest and next to each other: nothing in it learns."""

    def forward(self, *maps: Tensor) -> Tensor:
        return maps[0] if len(maps) == 1 else torch.cat([maps[0], *(_up(deep, maps[0]) for deep in maps[1:])], dim=1)


def _up(deep: Tensor, fine: Tensor) -> Tensor:
    return F.interpolate(deep, size=fine.shape[-2:], mode="bilinear", align_corners=False)


def _groups(channels: int) -> int:
    """The number of groups nearest to 8 channels a group that divides `channels`."""
    wanted = max(1, channels // 8)
    return max(groups for groups in range(1, wanted + 1) if channels % groups == 0)
