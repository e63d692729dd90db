"""Nets by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from .. import catalog
from ..config import ModelConfig
from ..errors import ConfigError
from .base import CosineClassifier, NetSettings, SegmentationModel, linear_classifier
from .weights import load_weights

MODEL_NAMES = tuple(name for name in catalog.names(catalog.NETS) if not catalog.is_open(name))  # the package's own
_DEFAULT = ModelConfig()


def build_model(
    name: str,
    num_classes: int,
    *,
    weights: str | Path | None = None,
    body_only: bool = False,
    feature_dim: int | None = _DEFAULT.feature_dim,
    freeze_bn: bool = _DEFAULT.freeze_bn,
    frozen_bn_eps: float = _DEFAULT.frozen_bn_eps,
    stride: int | None = _DEFAULT.stride,
    pretrained: bool = _DEFAULT.pretrained,
    classifier: str = _DEFAULT.classifier,
) -> SegmentationModel:
    """A net by its name in the catalog (`MODEL_NAMES`, `timm/NAME`, `transformers/NAME`, `MODULE:NAME`) on the CPU, from a file's weights
    (`body_only`: all but its classifier) or from random ones.

    `feature_dim`: D, but of DeepLab-v2, which has its backbone's; None: the body's maps next to each other, without a head that would have
    to learn. `freeze_bn`: BatchNorm with fixed statistics and affine parameters, in training mode too; a checkpoint saved with it loads
    without it and the other way round. `frozen_bn_eps`: of DeepLab's frozen BatchNorm (0 in the released code); the published 1e-3 of Lite
    stays. `stride`: pixels per feature where the net offers several; None: its own choice. `pretrained`: with the weights that timm or
    transformers has. `classifier`: "own", or a "linear" (1x1) or "cosine" one in the place of the net's. Raises ConfigError for an unknown
    name and for what a net does not have, and what `load_weights` raises.
    """
    if num_classes < 1 or (feature_dim is not None and feature_dim < 1):
        raise ConfigError(f"model: num_classes and feature_dim must be at least 1, got {num_classes} and {feature_dim}")
    try:
        row = catalog.net(name)
    except KeyError:
        near = difflib.get_close_matches(name, MODEL_NAMES, n=1)
        there = ", ".join(catalog.names(catalog.NETS))
        raise ConfigError(
            f"model.name: no net {name!r}{f', did you mean {near[0]!r}?' if near else ''} There are {there}."
        ) from None
    if pretrained and not row.library:
        raise ConfigError(
            f"model.pretrained: {name} has no weights of a library; give a file by model.weights (docs/settings.md)"
        )
    settings = NetSettings(feature_dim, freeze_bn, frozen_bn_eps, name, stride, pretrained)
    model = catalog.load(row.home)(num_classes, settings)
    if stride is not None and model.stride != stride:
        raise ConfigError(f"model.stride: got {stride}, and {name} has stride {model.stride} alone: leave it null.")
    if classifier != "own":
        make = {"linear": linear_classifier, "cosine": CosineClassifier}[classifier]
        model.classifier = make(model.channels, num_classes)
    if weights is not None:
        load_weights(model, weights, body_only=body_only)
    return model
