"""VGG16 at output stride 8 for DeepLab-v2: no pool4 and pool5, conv5 dilated by 2, fc6 and fc7 as 3x3 convolutions of dilation 4, 1024
channels.

Layer numbers are those of the released backbone: torchvision's with pool4 taken out.
"""

from __future__ import annotations

import itertools

from torch import nn

from .chain import Block, Chain
from .norm import init_convs

# Channels of the convolutions; M: 2x2 max pooling. conv5 (the last three) is dilated.
LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512)
CHANNELS = 1024


class VGG16(nn.Sequential, Chain):
    """Layers by number, as the checkpoints name them; a block ends where the next convolution begins."""

    forward = Chain.forward  # pyright: ignore[reportAssignmentType]  # Sequential calls its argument `input`

    def blocks(self) -> list[Block]:
        starts = [i for i, layer in enumerate(self) if isinstance(layer, nn.Conv2d)]
        return [nn.Sequential(*list(self)[begin:end]) for begin, end in itertools.pairwise((*starts, len(self)))]

    def stages(self) -> tuple[int, ...]:
        return (2, 4, 7)  # after each pooling


def vgg16_body() -> VGG16:
    layers: list[nn.Module] = []
    inputs = 3
    for entry in LAYERS:
        if entry == "M":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(inputs, entry, 3, padding=1), nn.ReLU(inplace=True)]
        inputs = entry
    for outputs, dilation in ((512, 2), (512, 2), (512, 2), (CHANNELS, 4), (CHANNELS, 4)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
        inputs = outputs
    backbone = VGG16(*layers)
    init_convs(backbone)
    return backbone
