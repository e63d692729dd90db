"""DeepLab-v2: a backbone at output stride 8 and a classifier that sums four dilated 3x3 convolutions. Source: Chen et al., arXiv
1606.00915.
"""

from __future__ import annotations

from torch import Tensor, nn

from . import vgg
from .base import SegmentationModel
from .resnet import ResNet

BACKBONES = ("resnet101", "resnet50", "resnet18", "vgg16")
DILATIONS = (6, 12, 18, 24)


class Backbone(nn.Module):
    """Gives the backbone's keys the "backbone." of the released checkpoints."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class AtrousClassifier(nn.Module):
    """Logits [B, K, h, w] = sum of four 3x3 convolutions of dilation 6, 12, 18, 24; weights N(0, 0.01)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(nn.Conv2d(channels, num_classes, 3, padding=d, dilation=d) for d in DILATIONS)
        for conv in self.conv2d_list:
            nn.init.normal_(conv.weight, 0.0, 0.01)

    def forward(self, features: Tensor) -> Tensor:
        logits = self.conv2d_list[0](features)
        for conv in self.conv2d_list[1:]:
            logits = logits + conv(features)
        return logits


def deeplab_v2(backbone: str, num_classes: int, *, freeze_bn: bool, frozen_bn_eps: float) -> SegmentationModel:
    if backbone == "vgg16":
        body, channels = vgg.vgg16(), vgg.CHANNELS
    else:
        body = ResNet(backbone, frozen=freeze_bn, eps=frozen_bn_eps)
        channels = body.channels
    return SegmentationModel(
        f"deeplab_v2_{backbone}",
        Backbone(body),
        AtrousClassifier(channels, num_classes),
        stride=8,
        channels=channels,
        num_classes=num_classes,
    )
