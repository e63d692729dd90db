"""Triton kernels: the `triton` backend. One file per op word; the primitives keep the contract of `backends/reference.py`.

Runs on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1 was set before triton was imported (tests).
"""

from __future__ import annotations

import torch

from .class_moments import class_moments
from .pixels import DTYPES, INTERPRETED, interpreter_trouble
from .prototype_contrastive_loss.backward import prototype_contrastive_backward
from .prototype_contrastive_loss.forward import LSE_DTYPE, prototype_contrastive_forward, saves_logits
from .upsampled_cross_entropy import upsampled_cross_entropy_forward
from .upsampled_prediction import upsampled_prediction

__all__ = [
    "LSE_DTYPE",
    "class_moments",
    "interpreter_trouble",
    "prototype_contrastive_backward",
    "prototype_contrastive_forward",
    "saves_logits",
    "upsampled_cross_entropy_forward",
    "upsampled_prediction",
    "why_not",
]
_MAX_CLASSES = {"upsampled_cross_entropy": 4096, "upsampled_prediction": 256}


def why_not(op: str, **what) -> str | None:
    """None where these kernels can do `op` on tensors such as `what`, else the reason in words."""
    device, dtype = what["device"], what["dtype"]
    if dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if what.get("has_variances"):
        return "the Triton kernels do not have the variance term; use backend='reference'"
    if device.type == "cpu" and not INTERPRETED:
        return "Triton needs an NVIDIA GPU; on the CPU it runs in its interpreter only (set TRITON_INTERPRET=1 before importing triton)"
    if device.type == "cpu" and (trouble := interpreter_trouble()):
        return trouble
    if device.type == "cpu" and dtype == torch.bfloat16 and not op.startswith("upsampled"):
        return "Triton's interpreter multiplies bfloat16 matrices wrongly; use float32 or float16 there"
    if device.type not in ("cpu", "cuda"):
        return f"the Triton kernels run on NVIDIA GPUs, not on {device.type}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8:
        return "the Triton kernels need compute capability 8.0 or newer"
    if what.get("num_classes", 1) > _MAX_CLASSES.get(op, 1 << 24):
        return f"{op} in Triton takes at most {_MAX_CLASSES[op]} classes"
    return None
