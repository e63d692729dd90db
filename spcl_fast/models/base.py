"""What every net looks like from outside: images -> features -> logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .chain import Chain
from .layers import registration_order

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_EXTRACTOR = "feature_extractor."


class NetSettings(NamedTuple):
    """What a net of the catalog is built with; a net uses what applies to it."""

    feature_dim: int | None  # channels, where the body leaves the choice; None: its own maps, without a head
    freeze_bn: bool  # BatchNorm with fixed statistics and affine parameters, in training mode too
    frozen_bn_eps: float  # of that BatchNorm, where no published value belongs to the weights
    name: str  # as model.name has it: what stands for the words in capitals of a row of the catalog
    stride: int | None  # pixels per feature; None: the net's own choice
    pretrained: bool  # with the weights of the row's library


class SegmentationModel(nn.Module):
    """A feature extractor and a classifier on its features.

    `stride`: pixels of the image per pixel of the features, `channels`: D, `num_classes`: K.
    The state dict has two parts, `feature_extractor.*` and `classifier.*`, named like the two dictionaries of a released SPCL checkpoint.
    `head`: which part of the extractor learns at the head's rate, like the classifier (a name of a submodule), if any.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        feature_extractor: nn.Module,
        classifier: nn.Module,
        *,
        stride: int,
        channels: int,
        num_classes: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        head: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.feature_extractor = feature_extractor
        self.classifier = classifier
        self.stride, self.channels, self.num_classes = stride, channels, num_classes
        self.head = head
        self.body_frozen = False
        # Constants of the net, not state: a checkpoint of the release has none and must load.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def freeze_body(self) -> SegmentationModel:
        """Train nothing but the classifier and the extractor's own head: the rest keeps its weights and, in training mode too, its
        statistics, and a step keeps nothing of it for the backward. Raises ConfigError for a net whose features would all be fixed.
        """
        if not any(name.startswith(_EXTRACTOR) and self._in_head(name) for name, _ in self._learning()):
            raise ConfigError(
                f"model.freeze_body: {self.name} names no submodule with weights as its `head`, between body and classifier, so no loss "
                "could move its features. Name one (docs/settings.md, nets by name), leave the setting out, or train a classifier on fixed "
                "features by `spcl-fast head`."
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and self._in_head(name))
        self.body_frozen = True
        return self.train(self.training)

    def train(self, mode: bool = True) -> SegmentationModel:
        super().train(mode)
        if self.body_frozen and self.head is not None:
            self.feature_extractor.eval()
            self.feature_extractor.get_submodule(self.head).train(mode)
        return self

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] RGB in [0, 1] -> [B, D, h, w], not normalised to unit length."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(
                f"images: expected floating point RGB in [0, 1], got {images.dtype}; divide 8-bit images by 255"
            )
        return self.feature_extractor((images - self.mean) / self.std)

    def classify(self, features: Tensor) -> Tensor:
        """[B, D, h, w] -> logits [B, K, h, w]."""
        return self.classifier(features)

    @property
    def chain(self) -> Chain | None:
        """The part of the extractor whose segments can be recomputed in the backward; None where the net is not made of blocks."""
        return next((module for module in self.feature_extractor.modules() if isinstance(module, Chain)), None)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, self.classify(features)

    def parameter_groups(self, lr: float, head_multiplier: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Groups for an optimiser: the body at `lr`, the head (classifier, and the extractor's own head) at `lr * head_multiplier`.

        With `layer_decay` below 1 the body is a group per layer: the last one at `lr`, each earlier one at `layer_decay` times the rate of
        the next (ELECTRA, BEiT). Each group has "name", "params", "lr" and "lr_scale"; parameters that do not learn are left out, and so
        is an empty group.
        """
        parts: dict[str, list[nn.Parameter]] = {"body": [], "head": []}
        scales = {"body": 1.0, "head": float(head_multiplier)}
        learning = list(self._learning())
        if layer_decay != 1:
            body = {name: name.removeprefix(_EXTRACTOR) for name, _ in learning if not self._in_head(name)}
            depth = registration_order(list(body.values()))
            last = max(depth.values(), default=0)
            layers = {f"body.{i}": layer_decay ** (last - i) for i in range(last + 1)}
            parts, scales = {name: [] for name in layers} | {"head": []}, layers | {"head": scales["head"]}
        for name, parameter in learning:
            layer = "body" if layer_decay == 1 else f"body.{depth[body[name]]}" if name in body else ""
            parts["head" if self._in_head(name) else layer].append(parameter)
        return [{"name": n, "params": p, "lr": lr * scales[n], "lr_scale": scales[n]} for n, p in parts.items() if p]

    def _learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.named_parameters() if p.requires_grad)

    def _in_head(self, name: str) -> bool:
        return name.startswith("classifier.") or (
            self.head is not None and name.startswith(f"{_EXTRACTOR}{self.head}.")
        )


class CosineClassifier(nn.Module):
    """Logits [B, K, h, w] = exp(log_scale) * cosine of a feature to each class's weight; plain PyTorch, so that it is exported, too."""

    def __init__(self, channels: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        nn.init.normal_(self.weight, std=channels**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        unit = F.normalize(features, dim=1), F.normalize(self.weight, dim=1)
        return self.log_scale.exp() * F.conv2d(*unit)


def linear_classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """1x1 convolution that starts near zero, so that the first losses are close to ln K whatever the features' scale."""
    classifier = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(classifier.weight, 0.0, 0.01)
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)
    return classifier
