"""SDCA's loss and estimator (BIT-DA/SDCA) and ProCA's (jiangzhengkai/ProCA), same names and signatures: change the imports.

    from spcl_fast.compat.sdca import PixelContrastiveLoss, semantic_dist_estimator
    from spcl_fast.compat.sdca import PrototypeContrastiveLoss, prototype_dist_estimator  # ProCA

Different from the authors': features may be maps [B, A, h, w] with labels [B, H, W] of any size, so the script's permute, view and
F.interpolate of labels can go; a batch in which nothing is labelled gives 0 instead of NaN; statistics are float64 inside; everything is on
the device of the estimator (`device`, None: CUDA where there is one), and its files are read with weights_only=True.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..estimators import ProtoEstimator
from ..losses.sdca import proca_loss, sdca_loss
from ..ops import class_moments


class PixelContrastiveLoss(nn.Module):
    """SDCA. cfg needs SOLVER.TAU and INPUT.IGNORE_LABEL. forward(Mean [C, A], CoVariance [C, A], feat, labels) -> [].

    feat [N, A] with labels [N], or maps. Quirk kept: the rows of CoVariance are made unit length, as those of Mean are.
    """

    def __init__(self, cfg) -> None:
        super().__init__()
        self.cfg = cfg

    def forward(self, Mean: Tensor, CoVariance: Tensor, feat: Tensor, labels: Tensor) -> Tensor:
        return sdca_loss(
            feat, labels, _constant("Mean", Mean), _constant("CoVariance", CoVariance), temperature=self.cfg.SOLVER.TAU,
            ignore_index=self.cfg.INPUT.IGNORE_LABEL,
        )  # fmt: skip


class PrototypeContrastiveLoss(nn.Module):
    """ProCA. cfg needs MODEL.CONTRAST.TAU and INPUT.IGNORE_LABEL. forward(Proto [C, A], feat, labels) -> []."""

    def __init__(self, cfg) -> None:
        super().__init__()
        self.cfg = cfg

    def forward(self, Proto: Tensor, feat: Tensor, labels: Tensor) -> Tensor:
        return proca_loss(
            feat, labels, _constant("Proto", Proto), temperature=self.cfg.MODEL.CONTRAST.TAU, ignore_index=self.cfg.INPUT.IGNORE_LABEL
        )  # fmt: skip


def _constant(name: str, value: Tensor) -> Tensor:
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but is a constant of the loss; pass {name}.detach()")
    return value


class _Estimator:
    """What both estimators are: statistics of the raw features, and files named after their number of channels."""

    files: tuple[str, str]  # of scores [C, C] and of features
    keys: dict[str, str]  # in a file: attribute

    def __init__(self, feature_num: int, cfg, *, device: Any = None) -> None:
        self.cfg = cfg
        self.class_num = cfg.MODEL.NUM_CLASSES
        _, backbone = cfg.MODEL.NAME.split("_")
        self.feature_num = 2048 if backbone.startswith("resnet") else 1024
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.init(feature_num, resume=cfg.CV_DIR)

    def init(self, feature_num: int, resume: str = "") -> None:
        """Statistics of 0, or those of the folder `resume`: its file for scores where feature_num is the number of classes."""
        self._statistics = ProtoEstimator(
            self.class_num, feature_num, normalize=False, ignore_index=self.cfg.INPUT.IGNORE_LABEL
        ).to(self._device)
        if not resume:
            return
        if feature_num not in (self.class_num, self.feature_num):
            raise RuntimeError(
                f"Feature_num not available: {feature_num}; {self.cfg.MODEL.NAME} has {self.feature_num} channels and "
                f"{self.class_num} classes"
            )
        path = os.path.join(resume, self.files[feature_num != self.class_num])
        saved = torch.load(path, map_location=self._device, weights_only=True)
        self._statistics.load_(*(saved.get(key) for key in self.keys))

    @property
    def Amount(self) -> Tensor:
        return self._statistics.amount.float()

    def update(self, features: Tensor, labels: Tensor) -> None:
        """features [N, A] with labels [N], or maps [B, A, h, w] with labels [B, H, W]."""
        self._statistics.update_(features, labels)

    def save(self, name: str) -> None:
        """OUTPUT_DIR/name, which either estimator resumes from."""
        found = {key: getattr(self, name).cpu() for key, name in self.keys.items() if name}
        torch.save(found, os.path.join(self.cfg.OUTPUT_DIR, name))


class semantic_dist_estimator(_Estimator):
    """SDCA's: `Mean`, `CoVariance` [C, A] and `Amount` [C]. cfg needs MODEL.NUM_CLASSES and
    NAME, CV_DIR, INPUT.IGNORE_LABEL and OUTPUT_DIR.

    Memory: [C, A] sums; the authors' update makes three tensors [N, C, A].
    """

    files = "out_dist.pth", "feat_dist.pth"
    keys = {"Mean": "Mean", "CoVariance": "CoVariance", "Amount": "Amount"}

    @property
    def Mean(self) -> Tensor:
        return self._statistics.prototypes

    @property
    def CoVariance(self) -> Tensor:
        return self._statistics.variances


class prototype_dist_estimator(_Estimator):
    """ProCA's: `Proto` [C, A] and `Amount` [C]; cfg needs MODEL.CONTRAST.USE_MOMENTUM and MOMENTUM, too.

    Quirk kept: with momentum, a class that the batch has adds the number of ALL labelled pixels to its `Amount` (nothing reads it).
    """

    files = "prototype_out_dist.pth", "prototype_feat_dist.pth"
    keys = {"Proto": "Proto", "": "", "Amount": "Amount"}  # it has no variances

    def __init__(self, feature_num: int, cfg, *, device: Any = None) -> None:
        self.use_momentum = cfg.MODEL.CONTRAST.USE_MOMENTUM
        self.momentum = cfg.MODEL.CONTRAST.MOMENTUM
        super().__init__(feature_num, cfg, device=device)

    @property
    def Proto(self) -> Tensor:
        return self._statistics.prototypes

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """As `semantic_dist_estimator.update`; with momentum, a class's mean takes `momentum` of the batch's."""
        if not self.use_momentum:
            return super().update(features, labels)
        found = class_moments(
            features, labels, self.class_num, normalize=False, ignore_index=self.cfg.INPUT.IGNORE_LABEL
        )
        seen = found.counts > 0
        step = found.sums / found.counts.clamp_min(1)[:, None] - self._statistics.mean
        statistics = self._statistics
        statistics.mean = statistics.mean + self.momentum * step.where(seen[:, None], 0)
        statistics.amount = statistics.amount + found.counts.sum() * seen
