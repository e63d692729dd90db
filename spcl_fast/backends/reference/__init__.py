"""The reference backend ("reference"): everything of contract.py in plain PyTorch, on any device, in float64 too.

Weights are float32; accumulation is float32, or float64 for float64 features. One image at a time, so that a temporary is never larger than
one image's features. "P" stands for h * w pixels of an image.
"""

from __future__ import annotations

from ..contract import Ask
from .balance import balance_columns, balance_rows
from .contrast import contrast_backward, contrast_forward, contrast_scale, logits_backward, logits_forward, saved_like
from .moments import class_moments, move_prototypes
from .upsampled import (
    upsampled_binary_cross_entropy,
    upsampled_confusion,
    upsampled_cross_entropy,
    upsampled_prediction,
)

__all__ = [
    "balance_columns",
    "balance_rows",
    "class_moments",
    "contrast_backward",
    "contrast_forward",
    "contrast_scale",
    "logits_backward",
    "logits_forward",
    "move_prototypes",
    "saved_like",
    "upsampled_binary_cross_entropy",
    "upsampled_confusion",
    "upsampled_cross_entropy",
    "upsampled_prediction",
    "why_not",
]


def why_not(ask: Ask) -> str | None:
    """It can do everything."""
    return None
