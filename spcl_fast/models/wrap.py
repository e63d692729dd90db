"""Any `nn.Module` as a net."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import IMAGENET_MEAN, IMAGENET_STD, SegmentationModel, linear_classifier


class WrappedFeatures(nn.Module):
    """A module's `features` method, or its forward, as a forward that checks what comes out."""

    body: Any  # the type of a Module's attributes says only Tensor or Module

    def __init__(self, module: nn.Module, channels: int, stride: int) -> None:
        super().__init__()
        self.body, self.channels, self.stride = module, channels, stride

    def forward(self, images: Tensor) -> Tensor:
        module = self.body
        features = module.features(images) if callable(getattr(module, "features", None)) else module(images)
        if (
            not isinstance(features, Tensor)
            or features.dim() != 4
            or features.shape[:2]
            != (
                images.shape[0],
                self.channels,
            )
        ):
            given = list(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise ConfigError(
                f"{type(module).__name__}: features of {list(images.shape)} images must be one tensor "
                f"[{images.shape[0]}, {self.channels} (its attribute channels), h, w], got {given}"
            )
        if not torch.compiler.is_compiling():
            self._check_stride(images, features)
        return features

    def _check_stride(self, images: Tensor, features: Tensor) -> None:
        """Within two pixels of the map: nets pad, cut and round in their own ways."""
        for size, found in zip(images.shape[2:], features.shape[2:], strict=True):
            if abs(found - size / self.stride) > 2:
                raise ConfigError(
                    f"{type(self.body).__name__}: its attribute stride is {self.stride}, but images of {list(images.shape[2:])} pixels "
                    f"gave features of {list(features.shape[2:])}. Correct stride, or the features."
                )


def wrap_model(
    module: nn.Module,
    num_classes: int,
    *,
    classifier: nn.Module | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> SegmentationModel:
    """Any `nn.Module` with a method `features(images [B, 3, H, W]) -> [B, D, h, w]`, or a forward like it, and integers `stride` and
    `channels` (= D) as a net.

    It gets images with `mean` subtracted and divided by `std` (the module's own attributes of that name, else ImageNet's; give (0, 0, 0)
    and (1, 1, 1) to get RGB in [0, 1]). `classifier`: maps features to logits; None: a new 1x1 convolution. A module's attribute `head`, if
    any, is the name of its submodule that learns at the head's rate.
    """
    lacking = [name for name in ("stride", "channels") if not hasattr(module, name)]
    if not callable(getattr(module, "features", None)) and type(module).forward is nn.Module.forward:
        lacking.insert(0, "features")
    if lacking:
        raise ConfigError(
            f"wrap_model: {type(module).__name__} lacks {', '.join(lacking)}; it needs features(images) (or a forward that gives them), "
            "stride and channels."
        )
    try:
        channels, stride = (int(getattr(module, name)) for name in ("channels", "stride"))
        usable = channels >= 1 and stride >= 1
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise ConfigError(
            f"wrap_model: {type(module).__name__}: stride and channels must be whole numbers of 1 or more, got {module.stride!r} and "
            f"{module.channels!r}"
        )
    _check_arguments(module)
    head = getattr(module, "head", None)
    return SegmentationModel(
        "custom",
        WrappedFeatures(module, channels, stride),
        linear_classifier(channels, num_classes) if classifier is None else classifier,
        stride=stride,
        channels=channels,
        num_classes=num_classes,
        mean=mean or getattr(module, "mean", IMAGENET_MEAN),
        std=std or getattr(module, "std", IMAGENET_STD),
        head=f"body.{head}" if isinstance(head, str) else None,
    )


def _check_arguments(module: nn.Module) -> None:
    function = getattr(module, "features", None)
    function = function if callable(function) else module.forward
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ConfigError(
            f"wrap_model: {type(module).__name__}: its {function.__name__} must take the images and nothing else: {error}"
        ) from None
    except ValueError:  # of something that has no signature: calling it will tell
        return
