"""Losses as `nn.Module`s and the objectives of methods: one file each."""

from .heads import CosineHead, LinearHead
from .modules import PrototypeContrastiveLoss, UpsampledCrossEntropyLoss

__all__ = [
    "CosineHead",
    "LinearHead",
    "PrototypeContrastiveLoss",
    "UpsampledCrossEntropyLoss",
]
