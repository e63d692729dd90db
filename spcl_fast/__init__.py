"""Prototype-contrastive losses for semantic segmentation at the speed of memory.

    import spcl_fast as sf
    loss = sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1)

Names are imported on first use, so that `spcl-fast --help` answers without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "prototype_contrastive_loss": "spcl_fast.ops",
    "class_moments": "spcl_fast.ops",
    "ClassMoments": "spcl_fast.ops",
    "prototype_logits": "spcl_fast.ops",
    "upsampled_cross_entropy": "spcl_fast.ops",
    "upsampled_binary_cross_entropy": "spcl_fast.ops",
    "upsampled_confusion": "spcl_fast.ops",
    "balance_": "spcl_fast.ops",
    "TeacherTargets": "spcl_fast.ops",
    "upsampled_prediction": "spcl_fast.ops",
    "Prediction": "spcl_fast.ops",
    "agreement_labels": "spcl_fast.ops",
    "check_labels": "spcl_fast.ops",
    "available_backends": "spcl_fast.backends",
    "PrototypeContrastiveLoss": "spcl_fast.losses",
    "UpsampledCrossEntropyLoss": "spcl_fast.losses",
    "PrototypeBank": "spcl_fast.estimators.bank",
    "PseudoLabelThresholds": "spcl_fast.estimators.thresholds",
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll] # one table, not a second list

if TYPE_CHECKING:
    from .backends import available_backends
    from .estimators.bank import PrototypeBank
    from .estimators.thresholds import PseudoLabelThresholds
    from .losses import PrototypeContrastiveLoss, UpsampledCrossEntropyLoss
    from .ops import (
        ClassMoments,
        Prediction,
        TeacherTargets,
        agreement_labels,
        balance_,
        check_labels,
        class_moments,
        prototype_contrastive_loss,
        prototype_logits,
        upsampled_binary_cross_entropy,
        upsampled_confusion,
        upsampled_cross_entropy,
        upsampled_prediction,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spcl_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # next time it is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
