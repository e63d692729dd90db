"""A net small enough to train from nothing in a minute on two CPU cores: what the generated demo runs. About 0.2 M parameters, features
at stride 4.

GroupNorm instead of BatchNorm: there are no published statistics to freeze, and batches are small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import NetSettings, SegmentationModel, linear_classifier
from .chain import Block, Chain
from .head import JoinedMaps, SkipHead
from .norm import init_convs

WIDTHS = (16, 32, 48)  # channels at stride 2, 4, 8
# of the residual blocks at stride 8: a receptive field of about 120 px without a fourth down-sampling
DILATIONS = (1, 2, 4)


class NormedConv(nn.Module):
    """3x3 convolution and GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        self.norm = nn.GroupNorm(outputs // 8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Residual(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.first = NormedConv(channels, channels, dilation=dilation)
        self.second = NormedConv(channels, channels, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x), inplace=True)), inplace=True)


class TinyFeatures(Chain):
    def __init__(self, feature_dim: int | None) -> None:
        super().__init__()
        half, quarter, eighth = WIDTHS
        self.stem = NormedConv(3, half, stride=2)
        self.down4 = NormedConv(half, quarter, stride=2)
        self.block4 = Residual(quarter, 1)
        self.down8 = NormedConv(quarter, eighth, stride=2)
        self.blocks8 = nn.Sequential(*(Residual(eighth, dilation) for dilation in DILATIONS))
        init_convs(self)
        self.head = JoinedMaps() if feature_dim is None else SkipHead(quarter, eighth, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        return super().forward(x)

    def blocks(self) -> list[Block]:
        def with_skip(block: nn.Module) -> Block:
            return lambda deep, skip: (block(deep), skip)

        def split(x: Tensor) -> tuple[Tensor, Tensor]:
            return F.relu(self.down8(x), inplace=True), x

        return [
            lambda x: F.relu(self.stem(x), inplace=True),
            lambda x: self.block4(F.relu(self.down4(x), inplace=True)),
            split,
            *(with_skip(block) for block in self.blocks8),
            lambda deep, skip: self.head(skip, deep),
        ]

    def stages(self) -> tuple[int, ...]:
        return (1, 2)


def tiny(num_classes: int, settings: NetSettings) -> SegmentationModel:
    channels = sum(WIDTHS[1:]) if settings.feature_dim is None else settings.feature_dim
    return SegmentationModel(
        "tiny",
        TinyFeatures(settings.feature_dim),
        linear_classifier(channels, num_classes),
        stride=4,
        channels=channels,
        num_classes=num_classes,
        head="head",
    )
