"""Losses as `nn.Module`s and the objectives of methods: one file each."""

from .capi import CAPIClustering, capi_loss
from .dino import DINOLoss, IBOTPatchLoss
from .gmmseg import gmm_class_logits, gmm_component_contrast, gmm_loss
from .heads import CosineHead, LinearHead
from .info_nce import masked_info_nce, prototype_info_nce
from .modules import PrototypeContrastiveLoss, UpsampledCrossEntropyLoss
from .panet import masked_mean, panet_alignment_loss, panet_logits, panet_loss, panet_prototypes
from .protoseg import ProtoSegLoss, pixel_prototype_contrast, pixel_prototype_distance, prototype_class_logits
from .sepico import bank_cl, dist_cl, proto_cl, proto_reg
from .swav import SwAVLoss
from .text import TextHead

__all__ = [
    "CAPIClustering",
    "CosineHead",
    "DINOLoss",
    "IBOTPatchLoss",
    "LinearHead",
    "ProtoSegLoss",
    "PrototypeContrastiveLoss",
    "SwAVLoss",
    "TextHead",
    "UpsampledCrossEntropyLoss",
    "capi_loss",
    "bank_cl",
    "dist_cl",
    "gmm_class_logits",
    "gmm_component_contrast",
    "gmm_loss",
    "masked_info_nce",
    "masked_mean",
    "panet_alignment_loss",
    "panet_logits",
    "panet_loss",
    "panet_prototypes",
    "pixel_prototype_contrast",
    "pixel_prototype_distance",
    "proto_cl",
    "proto_reg",
    "prototype_class_logits",
    "prototype_info_nce",
]
