"""The classes of the released SPCL code (BinhuiXie/SPCL), same signatures: change the import, keep the training script.

    from spcl_fast.compat.spcl import PixelCLLoss, PseudoLabel

Different from the release: a batch in which every pixel is ignored gives 0 instead of NaN; prototypes may require grad; thresholds are
saved once they exist, not before.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..errors import CheckpointError
from ..estimators.thresholds import PseudoLabelThresholds


def load_semantic_prototype(path: str | Path, num_classes: int) -> Tensor:
    """semantic_prototype.pth of the release, [D, K] -> [K, D] float32. Nothing in the file is run.

    Raises CheckpointError for a file that is no such tensor.
    """
    try:
        prototype = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as the release's semantic_prototype.pth: {_why(error, 'one tensor')}"
        ) from error
    if not isinstance(prototype, Tensor) or prototype.dim() != 2 or prototype.shape[1] != num_classes:
        found = (
            f"a tensor {list(prototype.shape)}" if isinstance(prototype, Tensor) else f"a {type(prototype).__name__}"
        )
        raise CheckpointError(f"{path} holds {found}; expected a tensor [D, {num_classes}], a column for each class")
    if not prototype.isfinite().all():
        raise CheckpointError(
            f"{path} holds values that are not finite: the net that made it had diverged. Make it again"
        )
    return prototype.float().t().contiguous()


def load_thres_const(path: str | Path, num_classes: int) -> Tensor:
    """thres_const.npy of the release -> [K] float32. Raises CheckpointError for another file, such as the empty one the release leaves."""
    try:
        thresholds = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be read as the release's thres_const.npy: {_why(error, 'one array of numbers')}"
        ) from error
    if thresholds.shape != (num_classes,) or not np.issubdtype(thresholds.dtype, np.floating):
        raise CheckpointError(
            f"{path} holds {thresholds.dtype} {list(thresholds.shape)}; expected a threshold for each of {num_classes} classes"
        )
    if not ((thresholds >= 0) & (thresholds <= 1)).all():
        raise CheckpointError(f"{path} holds thresholds {thresholds.tolist()}; expected probabilities from 0 to 1")
    return torch.from_numpy(thresholds).float()


def _why(error: Exception, expected: str) -> str:
    """In our words: libraries advise to run what is in a file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"expected {expected}, and it holds more than that, is damaged or is empty"


class PixelCLLoss(nn.Module):
    """core/utils/loss.py: the sum of the source's and the target's contrastive loss, temperature 100, unit features, 255 ignored.

    cfg is kept and never read. forward(semantic_prototype [D, K], src_feat [B, D, h, w], src_mask, tgt_feat, tgt_mask) -> [].
    A mask has one label per pixel of its features: [B, h, w], [B, 1, h, w] or flat.
    """

    def __init__(self, cfg=None, temperature: float = 100.0) -> None:
        super().__init__()
        self.cfg = cfg
        self.temperature = temperature

    def forward(
        self, semantic_prototype: Tensor, src_feat: Tensor, src_mask: Tensor, tgt_feat: Tensor, tgt_mask: Tensor
    ) -> Tensor:
        return self._domain(semantic_prototype, src_feat, src_mask) + self._domain(
            semantic_prototype, tgt_feat, tgt_mask
        )

    def _domain(self, semantic_prototype: Tensor, feat: Tensor, mask: Tensor) -> Tensor:
        if mask.numel() * feat.shape[1] != feat.numel():
            raise ValueError(
                f"PixelCLLoss: a mask must have one label per pixel of its features {list(feat.shape)}, got {list(mask.shape)}; scale "
                'labels down by F.interpolate(mode="nearest"), or use spcl_fast.prototype_contrastive_loss, which reads any size'
            )
        if semantic_prototype.dim() != 2 or len(semantic_prototype) != feat.shape[1]:
            raise ValueError(
                f"PixelCLLoss: semantic_prototype must be [D, K] = [{feat.shape[1]}, K] as the release keeps it, "
                f"got {list(semantic_prototype.shape)}"
            )
        mask = mask.reshape(feat.shape[0], *feat.shape[2:])  # the release takes any shape with as many pixels
        return ops.prototype_contrastive_loss(feat, mask, semantic_prototype.t(), temperature=self.temperature)


class PseudoLabel:
    """core/utils/pseudo_label.py: per-class confidence thresholds, without storing any confidence.

    cfg needs MODEL.NUM_CLASSES and, for `save_results`, OUTPUT_DIR. A class that is never predicted has threshold 0, as in the release.
    """

    def __init__(self, cfg) -> None:
        self.cfg = cfg
        self.number_class = cfg.MODEL.NUM_CLASSES
        self.thres: np.ndarray | list = []
        self.iter = 0
        self._thresholds = PseudoLabelThresholds(self.number_class, cap=1.0)

    def update_pseudo_label(self, input: Tensor) -> None:
        """input: logits [B, K, H, W], up-sampled already."""
        height, width = input.shape[2:]
        self._thresholds.update(ops.upsampled_prediction(input.detach(), (height, width)))
        self.iter += 1

    def get_threshold_const(self, thred: float) -> np.ndarray:
        """[K] float64: min(thred, median of the confidences of each class), within 1/2048 of a median that moved far on the way."""
        thresholds = torch.where(self._thresholds.counts() > 0, self._thresholds.thresholds(), 0.0)
        self.thres = np.minimum(thresholds.double().numpy(), thred)
        return self.thres

    def save_results(self) -> None:
        """Writes OUTPUT_DIR/thres_const.npy; computes the thresholds with 0.9, as the release's script does, where nobody has yet."""
        if len(self.thres) == 0:
            self.get_threshold_const(0.9)
        np.save(os.path.join(self.cfg.OUTPUT_DIR, "thres_const.npy"), self.thres)
