"""The C++ backend ("cpu"): csrc/ through torch.ops.spcl_fast_cpu. Same primitives as reference.py, on CPU tensors.

One pass over the features in the forward, one in the backward; the only feature-sized allocation is the gradient. The up-sampled ops
allocate no up-sampled map: results of the labels' size and, for the gradient, at most twice the logits in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .built import BUILT, build_record
from .labels import bad_label_message

_OPS = ("prototype_contrastive_loss", "class_moments", "upsampled_cross_entropy", "upsampled_prediction")
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


def why_not(
    op: str, *, device: torch.device, dtype: torch.dtype, num_classes: int, dim: int, has_variances: bool
) -> str | None:
    if _MISSING is not None:
        return _MISSING
    if op not in _OPS:
        return f"the C++ backend has no {op}; it has {' and '.join(_OPS)}"
    if device.type != "cpu":
        return f"the C++ backend works on CPU tensors, not on {device}"
    if dtype not in _DTYPES:
        return f"the C++ backend takes float32, bfloat16 and float16 features, not {dtype}; the reference backend takes float64"
    if has_variances:
        return "the C++ backend has no `variances`; the reference backend has"
    return None


def saves_logits(num_classes: int, dim: int, dtype: torch.dtype | None = None) -> bool:
    """Whether the forward keeps the logits: measured, 4 K bytes a pixel out and in beat a second product from D of about 100 on.
    Never more than a third of the features' bytes."""
    return dim >= 128 and num_classes * 3 <= dim


def prototype_contrastive_forward(
    features,
    labels,
    prototypes,
    class_weight,
    pixel_weight,
    variances,
    *,
    temperature,
    normalize,
    ignore_index,
    reduction,
    save,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *outputs, report = _ops.prototype_contrastive_forward(
        features, labels, _plain(prototypes), _plain(class_weight), _floats(pixel_weight), temperature, normalize, ignore_index,
        reduction == "mean", reduction == "none", save, saves_logits(*prototypes.shape),
    )  # fmt: skip
    _raise_for(report, prototypes.shape[0], ignore_index)
    return tuple(outputs)


def prototype_contrastive_backward(
    grad_loss, features, labels, prototypes, class_weight, pixel_weight, variances, lse, inv_norm, logits, denominator,
    *, temperature, normalize, ignore_index, reduction, needs_dfeatures, needs_dprototypes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dfeatures = _empty_gradient(features) if needs_dfeatures else features.new_empty(0)
    dprototypes = _ops.prototype_contrastive_backward(
        _floats(grad_loss), features, labels, _plain(prototypes), _plain(class_weight), _floats(pixel_weight),
        lse, inv_norm, logits, denominator,
        dfeatures, temperature, normalize, ignore_index, needs_dfeatures, needs_dprototypes,
    )  # fmt: skip
    return dfeatures, dprototypes


def class_moments(features, labels, num_classes, *, normalize, squares, ignore_index) -> tuple[Tensor, Tensor, Tensor]:
    *outputs, report = _ops.class_moments(features, labels, num_classes, normalize, squares, ignore_index)
    _raise_for(report, num_classes, ignore_index)
    return tuple(outputs)


def upsampled_cross_entropy_forward(
    logits, labels, class_weight, pixel_weight, *, temperature, align_corners, ignore_index, reduction, needs_dlogits
) -> tuple[Tensor, Tensor]:
    loss, dlogits, report = _ops.upsampled_cross_entropy_forward(
        logits.detach(), labels, _plain(class_weight), _floats(pixel_weight), temperature, align_corners, ignore_index,
        reduction == "mean", reduction == "none", needs_dlogits,
    )  # fmt: skip
    _raise_for(report, logits.shape[1], ignore_index)
    return loss, dlogits


def upsampled_prediction(
    logits, size, thresholds, *, temperature, align_corners, ignore_index
) -> tuple[Tensor, Tensor]:
    return _ops.upsampled_prediction(
        logits.detach(), *size, _plain(thresholds), temperature, align_corners, ignore_index
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
