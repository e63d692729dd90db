"""Triton kernels, launched by `backends/triton.py`. One file per op word; what they compute is `backends/contract.py`.

Runs on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1 was set before triton was imported (tests).
"""

from __future__ import annotations

from .class_moments import class_moments
from .pixels import INTERPRETED, interpreter_trouble
from .prototype_contrastive_loss.backward import prototype_contrastive_backward
from .prototype_contrastive_loss.forward import LSE_DTYPE, prototype_contrastive_forward, saves_logits
from .upsampled_cross_entropy import upsampled_cross_entropy_forward
from .upsampled_prediction import upsampled_prediction

__all__ = [
    "INTERPRETED",
    "LSE_DTYPE",
    "class_moments",
    "interpreter_trouble",
    "prototype_contrastive_backward",
    "prototype_contrastive_forward",
    "saves_logits",
    "upsampled_cross_entropy_forward",
    "upsampled_prediction",
]
