"""Losses as `nn.Module`s and the objectives of methods: one file each."""

from .gmmseg import gmm_class_logits, gmm_component_contrast, gmm_loss
from .heads import CosineHead, LinearHead
from .modules import PrototypeContrastiveLoss, UpsampledCrossEntropyLoss
from .protoseg import ProtoSegLoss, pixel_prototype_contrast, pixel_prototype_distance, prototype_class_logits

__all__ = [
    "CosineHead",
    "LinearHead",
    "ProtoSegLoss",
    "PrototypeContrastiveLoss",
    "UpsampledCrossEntropyLoss",
    "gmm_class_logits",
    "gmm_component_contrast",
    "gmm_loss",
    "pixel_prototype_contrast",
    "pixel_prototype_distance",
    "prototype_class_logits",
]
