"""DeepLab-v2: a backbone at output stride 8 and a classifier that sums four dilated 3x3 convolutions. Source: Chen et al., arXiv
1606.00915.
"""

from __future__ import annotations

from torch import Tensor, nn

from . import vgg
from .base import NetSettings, SegmentationModel
from .resnet import ResNet

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
        for weight in (parameter for name, parameter in self.named_parameters() if name.endswith(".weight")):
            nn.init.normal_(weight, 0.0, 0.01)

    def forward(self, features: Tensor) -> Tensor:
        logits = self.conv2d_list[0](features)
        for conv in self.conv2d_list[1:]:
            logits = logits + conv(features)
        return logits


def _deeplab_v2(name: str, body: nn.Module, channels: int, num_classes: int) -> SegmentationModel:
    return SegmentationModel(
        f"deeplab_v2_{name}",
        Backbone(body),
        AtrousClassifier(channels, num_classes),
        stride=8,
        channels=channels,
        num_classes=num_classes,
    )


def _on_resnet(name: str, num_classes: int, settings: NetSettings) -> SegmentationModel:
    body = ResNet(name, frozen=settings.freeze_bn, eps=settings.frozen_bn_eps)
    return _deeplab_v2(name, body, body.channels, num_classes)


def resnet101(num_classes: int, settings: NetSettings) -> SegmentationModel:
    return _on_resnet("resnet101", num_classes, settings)


def resnet50(num_classes: int, settings: NetSettings) -> SegmentationModel:
    return _on_resnet("resnet50", num_classes, settings)


def resnet18(num_classes: int, settings: NetSettings) -> SegmentationModel:
    return _on_resnet("resnet18", num_classes, settings)


def vgg16(num_classes: int, settings: NetSettings) -> SegmentationModel:
    return _deeplab_v2("vgg16", vgg.vgg16_body(), vgg.CHANNELS, num_classes)
