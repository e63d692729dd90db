"""The nets: DeepLab-v2, EfficientNet-Lite, a tiny one for the demo, those of timm and transformers, any other through `wrap_model`."""

from .base import SegmentationModel
from .build import MODEL_NAMES, build_model
from .discriminator import Discriminator
from .weights import LoadedWeights, load_weights
from .wrap import wrap_model

__all__ = [
    "MODEL_NAMES",
    "Discriminator",
    "LoadedWeights",
    "SegmentationModel",
    "build_model",
    "load_weights",
    "wrap_model",
]
