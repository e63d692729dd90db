"""The nets of a stage: how they are built, called and updated, from the settings alone.

A stage is built from a `Nets`. This one starts every stage from a new net, as the memory plan does; `RunNets` of training.py goes on
from what earlier stages of a run left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import Config, TrainConfig
from ..models import SegmentationModel, build_model
from ..runs.identity import step_seed
from ..train.absorb import AbsorbingSGD
from ..train.device import Precision
from ..train.lean import LeanModel, lean_model
from .parts import Shown, never

Module = TypeVar("Module", bound=nn.Module)


class Nets:
    """Nets, forwards and optimizers as the settings have them, on one device."""

    def __init__(self, config: Config, num_classes: int, device: torch.device, precision: Precision) -> None:
        self.config, self.num_classes, self.device, self.precision = config, num_classes, device, precision

    # --- where a stage starts from ------------------------------------------------------------------------------------

    def start(self, *, freeze_bn: bool | None = None) -> SegmentationModel:
        """The net that the stage trains. freeze_bn None: as model.freeze_bn."""
        return self.new(freeze_bn=freeze_bn)

    def prototypes(self, dim: int) -> Tensor:
        """[K, dim] float32, where contrastive learning starts."""
        return torch.zeros(self.num_classes, dim)

    def class_weight(self, side: str, power: float) -> Tensor | None:
        """[K] of the segmentation loss on the labels of a domain; None for power 0."""
        return torch.ones(self.num_classes, device=self.device) if power else None

    def classes_named(self, names: str | None, *, default: Sequence[str]) -> Tensor:
        """[K] bool: the classes of these names, with commas; None: those of `default`, all where the data have none of them."""
        return torch.ones(self.num_classes, dtype=torch.bool, device=self.device)

    # --- what it is made of -------------------------------------------------------------------------------------------

    def new(self, *, freeze_bn: bool | None = None, weights: bool = True) -> SegmentationModel:
        """A net with the same initial weights for every stage of a seed, or with those of model.weights."""
        model = self.config.model
        torch.manual_seed(step_seed(self.config.seed, "model", 0))
        net = build_model(
            model.name,
            self.num_classes,
            weights=model.weights if weights else None,
            body_only=model.body_only,
            feature_dim=model.feature_dim,
            freeze_bn=model.freeze_bn if freeze_bn is None else freeze_bn,
            frozen_bn_eps=model.frozen_bn_eps,
            stride=model.stride,
            classifier=model.classifier,
            pretrained=model.pretrained and weights,
        )
        if model.freeze_body:
            net.freeze_body()
        return self.channels_last(self.place(net)) if self.config.loop.channels_last else self.place(net)

    def place(self, module: Module) -> Module:
        """The module on the device of the nets."""
        return module.to(self.device)

    def channels_last(self, net: SegmentationModel) -> SegmentationModel:
        # documented, but in no overload of the stub
        return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def lean(self, model: SegmentationModel, shapes: Sequence[tuple[int, ...]]) -> LeanModel:
        """The net as a step calls it. shapes: [B, 3, H, W] of what its forwards see."""
        return lean_model(model, self.config.loop, self.precision, shapes)

    def optimizer(self, model: SegmentationModel, train: TrainConfig) -> torch.optim.Optimizer:
        groups = model.parameter_groups(train.lr, train.head_multiplier, self.config.model.layer_decay)
        return self.optimizer_of(groups, train)

    def optimizer_of(self, groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
        fused = self.device.type == "cuda"  # the default there (foreach) makes one more copy of all gradients
        if train.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay, fused=fused or None)
        if self.config.loop.absorb_gradients:
            return AbsorbingSGD(groups, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
        return torch.optim.SGD(
            groups, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, fused=fused or None
        )

    def shown(self, train: TrainConfig) -> Shown:
        """Whether an iteration ends with a log line, and so takes diagnostics; here none does."""
        return never
