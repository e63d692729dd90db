"""Losses as `nn.Module`s and the objectives of methods: one file each."""

from .modules import PrototypeContrastiveLoss, UpsampledCrossEntropyLoss

__all__ = ["PrototypeContrastiveLoss", "UpsampledCrossEntropyLoss"]
