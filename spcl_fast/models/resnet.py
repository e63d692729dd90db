"""ResNet-18/50/101 backbones at output stride 8, module names as torchvision's, so that its state dicts and the released checkpoints load.

The strides of layer3 and layer4 are replaced by dilation 2 and 4: the first block of a dilated layer keeps the dilation before it, as
torchvision does. Source: He et al., arXiv 1512.03385 (stride in the 3x3 convolution); Chen et al., arXiv 1606.00915 (dilation).
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from .chain import Block, Chain
from .norm import FrozenBatchNorm2d, batch_norm, conv_norm

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
WIDTHS = (64, 128, 256, 512)
STRIDES = (1, 2, 2, 2)
DILATED = (False, False, True, True)  # layers whose stride becomes dilation


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; both can be dilated, which torchvision's cannot."""

    expansion = 1

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        dilation: int,
        last_dilation: int,
        downsample: nn.Sequential | None,
        norm,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, last_dilation, last_dilation, bias=False)
        self.bn2 = norm(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        return _add_relu(conv_norm(self.conv2, self.bn2, out), x, self.downsample)


class Bottleneck(nn.Module):
    """1x1 down, 3x3 with stride or dilation, 1x1 up to 4 times the width."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        dilation: int,
        last_dilation: int,
        downsample: nn.Sequential | None,
        norm,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = norm(width * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        out = F.relu(conv_norm(self.conv2, self.bn2, out), inplace=True)
        return _add_relu(conv_norm(self.conv3, self.bn3, out), x, self.downsample)


def _add_relu(out: Tensor, x: Tensor, downsample: nn.Sequential | None) -> Tensor:
    if downsample is not None:
        conv, norm = downsample
        x = conv_norm(conv, norm, x)  # pyright: ignore[reportArgumentType]  # a Sequential does not say of what
    return F.relu(out.add_(x), inplace=True)


class ResNet(Chain):
    """[B, 3, H, W] -> [B, 512 or 2048, H/8, W/8]: everything of a classification ResNet up to layer4."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, name: str, *, frozen: bool, eps: float) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return batch_norm(channels, frozen=frozen, eps=eps if frozen else 1e-5)

        block = BasicBlock if name == "resnet18" else Bottleneck
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64)
        inputs, dilation = 64, 1
        for index, (width, depth, stride, dilated) in enumerate(
            zip(WIDTHS, DEPTHS[name], STRIDES, DILATED, strict=True), start=1
        ):
            first_dilation = dilation
            if dilated:
                dilation, stride = dilation * stride, 1
            downsample = None
            if stride != 1 or inputs != width * block.expansion:
                downsample = nn.Sequential(
                    nn.Conv2d(inputs, width * block.expansion, 1, stride, bias=False), norm(width * block.expansion)
                )
            blocks = [block(inputs, width, stride, first_dilation, dilation, downsample, norm)]
            inputs = width * block.expansion
            blocks += [block(inputs, width, 1, dilation, dilation, None, norm) for _ in range(depth - 1)]
            self.add_module(f"layer{index}", nn.Sequential(*blocks))
        self.channels = inputs
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Without statistics that normalise, each residual sum would double the variance: 2**33 after ResNet-101. Loading weights replaces
        # this.
        blocks = [module for module in self.modules() if isinstance(module, (BasicBlock, Bottleneck))]
        for block in blocks:
            last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
            if isinstance(last, FrozenBatchNorm2d):
                last.weight.fill_(len(blocks) ** -0.5)

    def stem(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True), 3, 2, 1)

    def blocks(self) -> list[Block]:
        return [self.stem, *self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def stages(self) -> tuple[int, ...]:
        layers = (self.layer1, self.layer2, self.layer3)
        return tuple(itertools.accumulate((len(layer) for layer in layers), initial=1))
