"""The C++ backend ("cpu"): csrc/ through torch.ops.spcl_fast_cpu, on CPU tensors.

One pass over the features in the forward, one in the backward; the only feature-sized allocation is the gradient. The up-sampled ops
allocate no up-sampled map: results of the labels' size and, for the gradient, at most twice the logits in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .built import BUILT, build_record
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
from .labels import bad_label_message

_OPS = ("prototype_contrastive_loss", "class_moments", "upsampled_cross_entropy", "upsampled_prediction")
_NEEDS: dict[str, frozenset[str]] = {}  # the options that each op has
_LARGE_BYTES = 4 << 20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load() -> str | None:
    """Register the C++ ops; None, or why they are not there."""
    try:
        from .. import _cpu  # noqa: F401
    except ImportError as error:
        reason = build_record("cpu")
        return (
            f"spcl_fast._cpu does not import: {error}" if reason == BUILT else f"spcl_fast._cpu was not built: {reason}"
        )
    return None


_MISSING = _load()
_ops = torch.ops.spcl_fast_cpu


def why_not(ask: Ask) -> str | None:
    if _MISSING is not None:
        return _MISSING
    if ask.op not in _OPS:
        return f"the C++ backend has no {ask.op}; it has {' and '.join(_OPS)}"
    if ask.device.type != "cpu":
        return f"the C++ backend works on CPU tensors, not on {ask.device}"
    if ask.dtype not in _DTYPES:
        return f"the C++ backend takes float32, bfloat16 and float16 features, not {ask.dtype}; the reference backend takes float64"
    missing = ask.needs - _NEEDS.get(ask.op, frozenset())
    if missing:
        return f"the C++ backend's {ask.op} has no {', no '.join(f'`{need}`' for need in sorted(missing))}; the reference backend has"
    return None


# ---- prototype_contrastive_loss -----------------------------------------------------------------------------------


def saves_logits(num_classes: int, dim: int) -> bool:
    """Whether the forward keeps the logits: measured, 4 K bytes per pixel out and in beat a second product from D of about 100 on.
    Never more than a third of the features' bytes."""
    return dim >= 128 and num_classes * 3 <= dim


def saved_like(contrast: Contrast, wanted: Wanted) -> SavedLike:
    return SavedLike(torch.float32, any(wanted) and saves_logits(*contrast.prototypes.shape))


def contrast_forward(contrast: Contrast, wanted: Wanted) -> tuple[Tensor, Saved]:
    c, num_classes = contrast, contrast.num_classes
    loss, denominator, lse, inv_norm, logits, report = _ops.prototype_contrastive_forward(
        c.features, c.labels, _plain(c.prototypes), _plain(c.class_weight), _floats(c.pixel_weight), c.temperature, c.normalize,
        c.ignore_index, c.reduction == "mean", c.reduction == "none", any(wanted), saves_logits(*c.prototypes.shape),
    )  # fmt: skip
    _raise_for(report, num_classes, c.ignore_index)
    return loss, Saved(denominator, lse, inv_norm, logits, c.features.new_empty(0))


def contrast_backward(grad_loss: Tensor, contrast: Contrast, saved: Saved, wanted: Wanted) -> Gradients:
    c = contrast
    dfeatures = _empty_gradient(c.features) if wanted.features else c.features.new_empty(0)
    dprototypes = _ops.prototype_contrastive_backward(
        _floats(grad_loss), c.features, c.labels, _plain(c.prototypes), _plain(c.class_weight), _floats(c.pixel_weight),
        saved.lse, saved.inv_norm, saved.logits, saved.denominator,
        dfeatures, c.temperature, c.normalize, c.ignore_index, wanted.features, wanted.prototypes,
    )  # fmt: skip
    return Gradients(dfeatures, dprototypes, *no_gradients(saved))


contrast_scale = reference.contrast_scale

# ---- class_moments ------------------------------------------------------------------------------------------------


def class_moments(problem: Moments) -> tuple[Tensor, Tensor, Tensor]:
    p = problem
    sums, counts, squares, report = _ops.class_moments(
        p.features, p.labels, p.num_classes, p.normalize, p.squares, p.ignore_index
    )
    _raise_for(report, p.num_classes, p.ignore_index)
    return sums, counts, squares


def move_prototypes(prototypes: Tensor, problem: Moments, average: Average) -> None:
    prototypes.copy_(average.moved(prototypes, *class_moments(problem)[:2]))


# ---- the up-sampled ops -------------------------------------------------------------------------------------------


def upsampled_cross_entropy(problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
    p = problem
    loss, dlogits, report = _ops.upsampled_cross_entropy_forward(
        p.logits.detach(), p.labels, _plain(p.class_weight), _floats(p.pixel_weight), p.temperature, p.align_corners, p.ignore_index,
        p.reduction == "mean", p.reduction == "none", needs_dlogits,
    )  # fmt: skip
    _raise_for(report, p.logits.shape[1], p.ignore_index)
    return loss, dlogits


def upsampled_prediction(problem: UpsampledClasses) -> tuple[Tensor, Tensor]:
    p = problem
    return _ops.upsampled_prediction(
        p.logits.detach(), *p.size, _plain(p.thresholds), p.temperature, p.align_corners, p.ignore_index
    )


def _empty_gradient(features: Tensor) -> Tensor:
    """torch.empty_like; a large one from huge pages that the next gradient uses again, since page faults cost more than the arithmetic."""
    if features.numel() * features.element_size() < _LARGE_BYTES:
        return torch.empty_like(features)
    return _ops.empty_gradient(features, torch.empty_like(features, device="meta").stride())


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float32)


def _plain(tensor: Tensor | None) -> Tensor | None:
    """float32 and contiguous: K rows, small."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def _raise_for(report: Tensor, num_classes: int, ignore_index: int) -> None:
    found, value, *pixel = report.tolist()
    if found:
        raise ValueError(bad_label_message(value, tuple(pixel), num_classes, ignore_index))
