"""Losses as `nn.Module`s and the objectives of methods: one file each."""

from .capi import CAPIClustering, capi_loss
from .cpsl import self_label_loss, self_labels
from .dino import DINOLoss, IBOTPatchLoss
from .feature_distance import feature_distance
from .gmmseg import gmm_class_logits, gmm_component_contrast, gmm_loss
from .heads import CosineHead, LinearHead
from .info_nce import masked_info_nce, prototype_info_nce
from .modules import PrototypeContrastiveLoss, UpsampledCrossEntropyLoss
from .pairs import pair_info_nce
from .panet import masked_mean, panet_alignment_loss, panet_logits, panet_loss, panet_prototypes
from .proda import cosine_weights, distance_weights, rectified_labels, symmetric_cross_entropy, uniform_regularizer
from .protoseg import ProtoSegLoss, pixel_prototype_contrast, pixel_prototype_distance, prototype_class_logits
from .sdca import proca_loss, sdca_loss
from .self_training import confident_cross_entropy, quality_weight, quality_weighted_cross_entropy
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
    "bank_cl",
    "capi_loss",
    "confident_cross_entropy",
    "cosine_weights",
    "dist_cl",
    "distance_weights",
    "feature_distance",
    "gmm_class_logits",
    "gmm_component_contrast",
    "gmm_loss",
    "masked_info_nce",
    "masked_mean",
    "pair_info_nce",
    "panet_alignment_loss",
    "panet_logits",
    "panet_loss",
    "panet_prototypes",
    "pixel_prototype_contrast",
    "pixel_prototype_distance",
    "proca_loss",
    "proto_cl",
    "proto_reg",
    "prototype_class_logits",
    "prototype_info_nce",
    "quality_weight",
    "quality_weighted_cross_entropy",
    "rectified_labels",
    "sdca_loss",
    "self_label_loss",
    "self_labels",
    "symmetric_cross_entropy",
    "uniform_regularizer",
]
