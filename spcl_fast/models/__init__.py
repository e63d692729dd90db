"""The nets: DeepLab-v2, EfficientNet-Lite0, a tiny one for the demo, any other through `wrap_model`; and the warm-up's discriminator."""

from .base import SegmentationModel
from .build import MODEL_NAMES, build_model, wrap_model
from .discriminator import Discriminator
from .weights import LoadedWeights, load_weights

__all__ = [
    "MODEL_NAMES",
    "Discriminator",
    "LoadedWeights",
    "SegmentationModel",
    "build_model",
    "load_weights",
    "wrap_model",
]
