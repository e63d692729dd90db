"""The Triton backend ("triton"): kernels/ on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1 was set before its import."""

# pyright: reportMissingImports=false
# spcl_fast.kernels lies next to this package, in kernels/, where only an installed package finds it

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..kernels import balance
from ..kernels import class_moments as moments
from ..kernels import prototype_logits as logits
from ..kernels import upsampled_confusion as confusion
from ..kernels import upsampled_cross_entropy as cross_entropy
from ..kernels import upsampled_prediction as prediction
from ..kernels.prototype_contrastive_loss import contrast as contrasts
from . import reference
from .contract import (
    Ask,
    Average,
    Balance,
    Contrast,
    Gradients,
    Logits,
    Moments,
    Saved,
    SavedLike,
    UpsampledClasses,
    UpsampledLoss,
    Wanted,
)
from .labels import BAD_PROBABILITY, label_flag, refuse_bad_labels

_LOGITS = {
    "variances",
    "per_image_prototypes",
    "bias",
    "tensor_temperature",
    "prototype_class",
    "dbias",
    "dtemperature",
}
OPTIONS = {  # the ops, and the options that each has
    "prototype_contrastive_loss": frozenset(
        {
            *_LOGITS, "probabilities", "teacher", "label_smoothing", "margin", "no_positive_variance", "denominator", "sigmoid",
        }
    ),
    "prototype_logits": frozenset(_LOGITS),
    "class_moments": frozenset({"pixel_weight"}),
    "upsampled_cross_entropy": frozenset({"denominator", "label_smoothing", "probabilities"}),
    "upsampled_binary_cross_entropy": frozenset({"denominator", "focal", "label_smoothing", "probabilities"}),
    "upsampled_prediction": frozenset({"int32_labels"}),
    "upsampled_confusion": frozenset(),
    "balance_": frozenset(),
}  # fmt: skip
_MAX_CLASSES = {"upsampled_cross_entropy": 4096, "upsampled_binary_cross_entropy": 4096}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(ask: Ask) -> str | None:
    op, device, dtype = ask.op, ask.device, ask.dtype
    if op not in OPTIONS:
        return f"the Triton backend has no {op}; it has {' and '.join(OPTIONS)}"
    if dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    missing = ask.needs - OPTIONS[op]
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
        return (
            f"{op} in Triton takes at most {_MAX_CLASSES.get(op, 1 << 24)} classes: its float32 sums over more of them may be less "
            "accurate than PyTorch's"
        )
    return None


# ---- prototype_contrastive_loss and prototype_logits ----------------------------------------------------------------


def saved_like(contrast: Contrast, wanted: Wanted) -> SavedLike:
    return SavedLike(contrasts.LSE_DTYPE, any(wanted) and contrasts.saves_logits(contrast))


def contrast_forward(contrast: Contrast, wanted: Wanted) -> tuple[Tensor, Saved]:
    refuse_bad_labels(contrast.labels, contrast.features.shape[2:], contrast.num_classes, contrast.ignore_index)
    flag = label_flag(contrast.features.device)
    loss, denominator, lse, inv_norm, scores = contrasts.contrast_forward(contrast, wanted, flag, BAD_PROBABILITY)
    return loss, Saved(denominator, lse, inv_norm, scores, contrast.features.new_empty(0))


def contrast_backward(grad_loss: Tensor, contrast: Contrast, saved: Saved, wanted: Wanted) -> Gradients:
    flag = label_flag(contrast.features.device)
    return Gradients(*contrasts.contrast_backward(grad_loss, contrast, saved, wanted, flag, BAD_PROBABILITY))


contrast_scale = reference.contrast_scale


def logits_forward(problem: Logits) -> Tensor:
    return logits.logits_forward(problem)


def logits_backward(grad_logits: Tensor, problem: Logits, wanted: Wanted) -> Gradients:
    return Gradients(*logits.logits_backward(grad_logits, problem, wanted))


# ---- class_moments ------------------------------------------------------------------------------------------------


def class_moments(problem: Moments) -> tuple[Tensor, Tensor, Tensor]:
    refuse_bad_labels(problem.labels, problem.features.shape[2:], problem.num_classes, problem.ignore_index)
    return moments.class_moments(problem, label_flag(problem.features.device))


def move_prototypes(prototypes: Tensor, problem: Moments, average: Average) -> None:
    prototypes.copy_(average.moved(prototypes, *class_moments(problem)[:2]))


# ---- the up-sampled ops -------------------------------------------------------------------------------------------


def upsampled_cross_entropy(problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
    refuse_bad_labels(problem.labels, problem.output_size, problem.logits.shape[1], problem.ignore_index)
    flag = label_flag(problem.logits.device)
    return cross_entropy.upsampled_cross_entropy(problem, needs_dlogits, flag, BAD_PROBABILITY)


def upsampled_binary_cross_entropy(problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
    refuse_bad_labels(problem.labels, problem.output_size, problem.logits.shape[1], problem.ignore_index)
    flag = label_flag(problem.logits.device)
    return cross_entropy.upsampled_binary_cross_entropy(problem, needs_dlogits, flag, BAD_PROBABILITY)


def upsampled_prediction(problem: UpsampledClasses) -> tuple[Tensor, Tensor]:
    return prediction.upsampled_prediction(problem)


def upsampled_confusion(problem: UpsampledClasses) -> Tensor:
    refuse_bad_labels(problem.labels, problem.size, problem.logits.shape[1], problem.ignore_index)
    return confusion.upsampled_confusion(problem, label_flag(problem.logits.device))


# ---- balance_ -----------------------------------------------------------------------------------------------------


def balance_rows(problem: Balance, v: Tensor) -> Tensor:
    return balance.balance_rows(problem, v)


def balance_columns(problem: Balance, u: Tensor) -> Tensor:
    return balance.balance_columns(problem, u)
