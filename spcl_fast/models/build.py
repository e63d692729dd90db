"""Nets by name, and any `nn.Module` as one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import catalog
from ..errors import ConfigError
from .base import IMAGENET_MEAN, IMAGENET_STD, NetSettings, SegmentationModel, linear_classifier
from .weights import load_weights

MODEL_NAMES = catalog.names(catalog.NETS)


def build_model(
    name: str,
    num_classes: int,
    *,
    weights: str | Path | None = None,
    body_only: bool = False,
    feature_dim: int = 64,
    freeze_bn: bool = True,
    frozen_bn_eps: float = 1e-5,
) -> SegmentationModel:
    """A net of the catalog (`MODEL_NAMES`) on the CPU, from a file's weights (`body_only`: all but its classifier) or from random ones.

    `feature_dim`: D of lite0 and tiny; DeepLab-v2 has its backbone's. `freeze_bn`: BatchNorm with fixed statistics and affine parameters,
    in training mode too; a checkpoint saved with it loads without it and the other way round. `frozen_bn_eps`: of DeepLab's frozen
    BatchNorm (0 in the released code); lite0 keeps its published 1e-3. Raises ConfigError for an unknown name, and what `load_weights`
    raises.
    """
    if num_classes < 1 or feature_dim < 1:
        raise ConfigError(f"model: num_classes and feature_dim must be at least 1, got {num_classes} and {feature_dim}")
    if name not in MODEL_NAMES:
        near = difflib.get_close_matches(name, MODEL_NAMES, n=1)
        raise ConfigError(
            f"model.name: no net {name!r}{f', did you mean {near[0]!r}?' if near else ''} There are {', '.join(MODEL_NAMES)}."
        )
    build = catalog.load(catalog.find(catalog.NETS, name).home)
    model = build(num_classes, NetSettings(feature_dim, freeze_bn, frozen_bn_eps))
    if weights is not None:
        load_weights(model, weights, body_only=body_only)
    return model


class _Wrapped(nn.Module):
    """A module's `features` method as its forward."""

    module: Any  # a Module with `features`; the type of a Module's attributes says only Tensor or Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module.features(images)


def wrap_model(
    module: nn.Module,
    num_classes: int,
    *,
    classifier: nn.Module | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> SegmentationModel:
    """Any `nn.Module` with a method `features(images [B, 3, H, W]) -> [B, D, h, w]` and integers `stride` and `channels` (= D) as a net.

    `features` gets images with `mean` subtracted and divided by `std` (the module's own attributes of that name, else ImageNet's; give
    (0, 0, 0) and (1, 1, 1) to get RGB in [0, 1]). `classifier`: maps features to logits; None: a new 1x1 convolution.
    """
    lacking = [name for name in ("features", "stride", "channels") if not hasattr(module, name)]
    if lacking:
        raise ConfigError(
            f"wrap_model: {type(module).__name__} lacks {', '.join(lacking)}; it needs features(images), stride and channels."
        )
    channels, stride = (int(getattr(module, name)) for name in ("channels", "stride"))
    return SegmentationModel(
        "custom",
        _Wrapped(module),
        linear_classifier(channels, num_classes) if classifier is None else classifier,
        stride=stride,
        channels=channels,
        num_classes=num_classes,
        mean=mean or getattr(module, "mean", IMAGENET_MEAN),
        std=std or getattr(module, "std", IMAGENET_STD),
    )
