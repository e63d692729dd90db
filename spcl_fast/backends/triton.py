"""The Triton backend ("triton"): kernels/ on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1 was set before its import."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from . import reference
from .contract import (
    Ask,
    Average,
    Contrast,
    Gradients,
    Moments,
    Saved,
    SavedLike,
    UpsampledClasses,
    UpsampledLoss,
    Wanted,
    no_gradients,
)

_OPS = ("prototype_contrastive_loss", "class_moments", "upsampled_cross_entropy", "upsampled_prediction")
_NEEDS: dict[str, frozenset[str]] = {}  # the options that each op has
_MAX_CLASSES = {"upsampled_cross_entropy": 4096, "upsampled_prediction": 256}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(ask: Ask) -> str | None:
    op, device, dtype = ask.op, ask.device, ask.dtype
    if op not in _OPS:
        return f"the Triton backend has no {op}; it has {' and '.join(_OPS)}"
    if dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    missing = ask.needs - _NEEDS.get(op, frozenset())
    if missing:
        return f"{op} in Triton has no {', no '.join(f'`{need}`' for need in sorted(missing))}; use backend='reference'"
    if device.type == "cpu" and not kernels.INTERPRETED:
        return "Triton needs an NVIDIA GPU; on the CPU it runs in its interpreter only (set TRITON_INTERPRET=1 before importing triton)"
    if device.type == "cpu" and (trouble := kernels.interpreter_trouble()):
        return trouble
    if device.type == "cpu" and dtype == torch.bfloat16 and not op.startswith("upsampled"):
        return "Triton's interpreter multiplies bfloat16 matrices wrongly; use float32 or float16 there"
    if device.type not in ("cpu", "cuda"):
        return f"the Triton kernels run on NVIDIA GPUs, not on {device.type}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8:
        return "the Triton kernels need compute capability 8.0 or newer"
    if ask.num_classes > _MAX_CLASSES.get(op, 1 << 24):
        return f"{op} in Triton takes at most {_MAX_CLASSES[op]} classes"
    return None


# ---- prototype_contrastive_loss -----------------------------------------------------------------------------------


def saved_like(contrast: Contrast, wanted: Wanted) -> SavedLike:
    c = contrast
    logits = any(wanted) and kernels.saves_logits(*c.prototypes.shape, c.features.dtype)
    return SavedLike(kernels.LSE_DTYPE, logits)


def contrast_forward(contrast: Contrast, wanted: Wanted) -> tuple[Tensor, Saved]:
    loss, *saved = kernels.prototype_contrastive_forward(*_tensors(contrast), **_settings(contrast), save=any(wanted))
    return loss, Saved(*saved, contrast.features.new_empty(0))


def contrast_backward(grad_loss: Tensor, contrast: Contrast, saved: Saved, wanted: Wanted) -> Gradients:
    dfeatures, dprototypes = kernels.prototype_contrastive_backward(
        grad_loss, *_tensors(contrast), saved.lse, saved.inv_norm, saved.logits, saved.denominator, **_settings(contrast),
        needs_dfeatures=wanted.features, needs_dprototypes=wanted.prototypes,
    )  # fmt: skip
    return Gradients(dfeatures, dprototypes, *no_gradients(saved))


contrast_scale = reference.contrast_scale


def _tensors(c: Contrast) -> tuple[Tensor | None, ...]:
    return c.features, c.labels, c.prototypes, c.class_weight, c.pixel_weight, c.variances


def _settings(c: Contrast) -> dict:
    return {
        "temperature": c.temperature,
        "normalize": c.normalize,
        "ignore_index": c.ignore_index,
        "reduction": c.reduction,
    }


# ---- class_moments ------------------------------------------------------------------------------------------------


def class_moments(problem: Moments) -> tuple[Tensor, Tensor, Tensor]:
    p = problem
    return kernels.class_moments(
        p.features, p.labels, p.num_classes, normalize=p.normalize, squares=p.squares, ignore_index=p.ignore_index
    )


def move_prototypes(prototypes: Tensor, problem: Moments, average: Average) -> None:
    prototypes.copy_(average.moved(prototypes, *class_moments(problem)[:2]))


# ---- the up-sampled ops -------------------------------------------------------------------------------------------


def upsampled_cross_entropy(problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
    p = problem
    return kernels.upsampled_cross_entropy_forward(
        p.logits, p.labels, p.class_weight, p.pixel_weight, temperature=p.temperature, align_corners=p.align_corners,
        ignore_index=p.ignore_index, reduction=p.reduction, needs_dlogits=needs_dlogits,
    )  # fmt: skip


def upsampled_prediction(problem: UpsampledClasses) -> tuple[Tensor, Tensor]:
    p = problem
    return kernels.upsampled_prediction(
        p.logits,
        p.size,
        p.thresholds,
        temperature=p.temperature,
        align_corners=p.align_corners,
        ignore_index=p.ignore_index,
    )
