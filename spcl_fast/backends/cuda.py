"""The CUDA C++ backend ("cuda"): csrc/cuda through torch.ops.spcl_fast_cuda. Same primitives as reference.py, on CUDA tensors.

Loaded when first asked about. What cannot be loaded is a reason in words, and Triton does the work.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .built import BUILT, build_record
from .labels import label_flag

OPS = ("prototype_contrastive_loss", "class_moments", "upsampled_cross_entropy", "upsampled_prediction")
# The whole row of a pixel's logits is in shared memory: 99 KB a block on sm_86, sm_89 and sm_120, 163 KB and more elsewhere.
_MAX_CONTRAST_CLASSES, _MAX_CONTRAST_CLASSES_SMALL = 240, 128
_MAX_CLASSES = {
    "upsampled_cross_entropy": 32767,
    "upsampled_prediction": 256,
}  # a class is an int16 in shared memory, a uint8 when written
_CACHED_BYTES = 1024
_ONE_PASS_CLASSES, _ONE_PASS_DIM = 32, 4096  # what a cluster holds of a tile: csrc/cuda/contrast_plan.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cuda",)
_ops = torch.ops.spcl_fast_cuda


@functools.cache
def missing() -> str | None:
    """Register the ops; None, or why they are not there. An extension that was built and does not load is worth one warning."""
    reason = build_record("cuda")
    if reason != BUILT:
        return f"spcl_fast._cuda was not built: {reason}"
    try:
        importlib.import_module("spcl_fast._cuda")
    except Exception as error:
        said = f"spcl_fast._cuda was built and does not load with torch {torch.__version__}; build it again: {error}"
        warnings.warn(
            f"{said}. The Triton kernels are used instead; `spcl-fast doctor` says more.", RuntimeWarning, stacklevel=2
        )
        return said
    return None


def why_not(
    op: str, *, device: torch.device, dtype: torch.dtype, num_classes: int, dim: int, has_variances: bool
) -> str | None:
    if device.type not in _DEVICES:
        return f"the CUDA kernels work on CUDA tensors, not on {device}"
    if op not in OPS:
        return f"the CUDA backend has no {op}; it has {' and '.join(OPS)}"
    if dtype not in _DTYPES:
        return f"the CUDA kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if has_variances:
        return "the CUDA kernels do not have the variance term; use backend='reference'"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return "the CUDA kernels need compute capability 8.0 or newer"
    if op == "prototype_contrastive_loss" and num_classes > _max_contrast_classes(device):
        return (
            f"{op} in CUDA takes at most {_max_contrast_classes(device)} classes on this device; use backend='triton'"
        )
    if num_classes > _MAX_CLASSES.get(op, num_classes):
        return f"{op} in CUDA takes at most {_MAX_CLASSES[op]} classes"
    return missing()


def _max_contrast_classes(device: torch.device) -> int:
    small = device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 6), (8, 9), (12, 0))
    return _MAX_CONTRAST_CLASSES_SMALL if small else _MAX_CONTRAST_CLASSES


def saves_logits(num_classes: int, dim: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether 4 K bytes a pixel are saved for the backward: where they are few beside the features, and a block's 64 pixels are too many
    bytes to be found in L2 when they are read again. Not yet measured on a GPU."""
    return num_classes * 4 <= dim and dim * dtype.itemsize > _CACHED_BYTES


_one_pass_asked = False  # not yet measured on a GPU


@contextlib.contextmanager
def in_one_pass() -> Iterator[None]:
    """For its time, losses whose features alone need a gradient are formed in one pass where `takes_one_pass`; for tests and benchmarks."""
    global _one_pass_asked
    before, _one_pass_asked = _one_pass_asked, True
    try:
        yield
    finally:
        _one_pass_asked = before


def takes_one_pass(features: Tensor, num_classes: int) -> bool:
    """Whether loss and gradient are formed together. float16 gradients would underflow; sm_90 and sm_100 alone share 227 KB a block."""
    fits = (
        num_classes <= _ONE_PASS_CLASSES
        and 0 < features.shape[1] <= _ONE_PASS_DIM
        and features.dtype in (torch.float32, torch.bfloat16)
    )
    return (
        _one_pass_asked
        and fits
        and (features.device.type != "cuda" or torch.cuda.get_device_capability(features.device)[0] in (9, 10))
    )


def prototype_contrastive_one_pass(
    features, labels, prototypes, class_weight, pixel_weight, *, temperature, normalize, ignore_index, reduction
) -> tuple[Tensor, Tensor]:
    """-> loss [], dfeatures (features' dtype and layout) for an incoming gradient of 1. reduction: "mean" or "sum"."""
    dfeatures = torch.empty_like(features)
    if features.numel() == 0:
        return features.new_zeros((), dtype=torch.float32), dfeatures
    loss = _ops.prototype_contrastive_one_pass(
        features, labels, prototypes.to(features.dtype).contiguous(), _plain(class_weight), pixel_weight, dfeatures,
        label_flag(features.device), temperature, normalize, ignore_index, reduction == "mean",
    )  # fmt: skip
    return loss, dfeatures


def prototype_contrastive_scale(dfeatures: Tensor, grad_loss: Tensor) -> None:
    """dfeatures (dense) *= grad_loss [], in place; where that is 1, which only the device knows, nothing is read or written."""
    if dfeatures.numel():
        _ops.prototype_contrastive_scale(dfeatures, grad_loss.float())


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
    """-> loss, denominator, lse [B, P], inv_norm [B, P], logits [B, K, P] or empty. Contract: `reference.py`."""
    if features.numel() == 0:
        return reference.prototype_contrastive_forward(
            features, labels, prototypes, class_weight, pixel_weight, variances,
            temperature=temperature, normalize=normalize, ignore_index=ignore_index, reduction=reduction, save=save,
        )  # fmt: skip
    return _ops.prototype_contrastive_forward(
        features, labels, prototypes.to(features.dtype).contiguous(), _plain(class_weight), pixel_weight, label_flag(features.device),
        temperature, normalize, ignore_index, reduction == "mean", reduction == "none", save,
        saves_logits(*prototypes.shape, features.dtype),
    )  # fmt: skip


def prototype_contrastive_backward(
    grad_loss, features, labels, prototypes, class_weight, pixel_weight, variances, lse, inv_norm, logits, denominator,
    *, temperature, normalize, ignore_index, reduction, needs_dfeatures, needs_dprototypes,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> dfeatures (features' dtype and layout) or empty, dprototypes [K, D] float32 or empty. Contract: `reference.py`."""
    dfeatures = torch.empty_like(features) if needs_dfeatures else features.new_empty(0)
    if features.numel() == 0:
        return dfeatures, features.new_zeros(prototypes.shape if needs_dprototypes else 0, dtype=torch.float32)
    dprototypes = _ops.prototype_contrastive_backward(
        grad_loss.float(), features, labels, prototypes.to(features.dtype).contiguous(), _plain(class_weight), pixel_weight,
        lse, inv_norm, logits, denominator, dfeatures, label_flag(features.device), temperature, normalize, ignore_index,
        needs_dfeatures, needs_dprototypes,
    )  # fmt: skip
    return dfeatures, dprototypes


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def class_moments(features, labels, num_classes, *, normalize, squares, ignore_index) -> tuple[Tensor, Tensor, Tensor]:
    """-> sums [K, D], counts [K] int64, squares [K, D] or empty. A pixel with a bad label is left out and raises the flag."""
    return _ops.class_moments(
        features, labels, label_flag(features.device), num_classes, normalize, squares, ignore_index
    )


def move_prototypes(prototypes, features, labels, *, keep, min_pixels, decay_absent, normalize, ignore_index) -> None:
    """class_moments whose total moves `prototypes` [K, D] in place: the sums never reach memory as a whole."""
    _ops.move_prototypes(
        prototypes,
        features,
        labels,
        label_flag(features.device),
        keep,
        min_pixels,
        decay_absent,
        normalize,
        ignore_index,
    )


def upsampled_cross_entropy_forward(
    logits, labels, class_weight, pixel_weight, *, temperature, align_corners, ignore_index, reduction, needs_dlogits
) -> tuple[Tensor, Tensor]:
    """-> loss, dlogits [B, K, h, w] float32 of the reduced loss (incoming gradient 1), or empty. Contract: `reference.py`."""
    if labels.numel() == 0:
        loss = torch.zeros(labels.shape if reduction == "none" else (), dtype=torch.float32, device=logits.device)
        return loss, torch.zeros(logits.shape if needs_dlogits else 0, dtype=torch.float32, device=logits.device)
    return _ops.upsampled_cross_entropy(
        _within_32_bits(logits), labels, _plain(class_weight), None if pixel_weight is None else pixel_weight.float(),
        label_flag(logits.device), temperature, align_corners, ignore_index, reduction == "mean", reduction == "none", needs_dlogits,
    )  # fmt: skip


def upsampled_prediction(
    logits, size, thresholds, *, temperature, align_corners, ignore_index
) -> tuple[Tensor, Tensor]:
    """-> labels uint8 [B, H, W] (ignore_index below the threshold), confidence float32 [B, H, W]. Contract: `reference.py`."""
    if logits.numel() == 0:
        shape = (logits.shape[0], *size)
        return logits.new_empty(shape, dtype=torch.uint8), logits.new_empty(shape, dtype=torch.float32)
    return _ops.upsampled_prediction(
        _within_32_bits(logits), *size, _plain(thresholds), temperature, align_corners, ignore_index
    )


def _within_32_bits(logits: Tensor) -> Tensor:
    """The kernels' offsets within one image and class; a view that is wider than that is copied, and low-resolution logits are small."""
    _, _, h, w = logits.shape
    return logits if (h - 1) * logits.stride(2) + (w - 1) * logits.stride(3) < 2**31 else logits.contiguous()
