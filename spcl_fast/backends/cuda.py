"""The CUDA C++ backend ("cuda"): csrc/cuda through torch.ops.spcl_fast_cuda. On CUDA tensors.

Loaded when first asked about. Where it cannot be loaded, the reason is kept and Triton does the work.
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
)
from .labels import label_flag

_MAX_CLASSES = {
    "prototype_contrastive_loss": 65536,  # tried up to there
    "upsampled_cross_entropy": 32767,  # a class is an int16 in shared memory
    "upsampled_confusion": 46340,  # an entry of the table is an int32
}
OPTIONS = {  # the ops, and the options that each has
    "prototype_contrastive_loss": frozenset(
        {"per_image_prototypes", "bias", "tensor_temperature", "probabilities", "label_smoothing", "margin", "denominator", "sigmoid",
         "dbias", "dtemperature", "variances", "no_positive_variance"}
    ),
    "class_moments": frozenset({"pixel_weight"}),
    "upsampled_cross_entropy": frozenset({"denominator"}),
    "upsampled_prediction": frozenset({"int32_labels"}),
    "upsampled_confusion": frozenset(),
}  # fmt: skip
_CACHED_BYTES = 1024
_COPIES, _COPIED_ENTRIES = 64, 1 << 18  # of the confusion's counts
_ONE_PASS_CLASSES, _ONE_PASS_DIM = 32, 4096  # what a cluster holds of a tile: csrc/cuda/contrast_plan.h
_SMALL = ((8, 6), (8, 9), (12, 0))  # compute capabilities with 99 KB of shared memory for a block
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cuda",)
_MAX_VARIANCE_DIM = 512  # for the gradient of the temperature; at 1204 its error was five times that of eager float32
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


def why_not(ask: Ask) -> str | None:
    op, device = ask.op, ask.device
    if device.type not in _DEVICES:
        return f"the CUDA kernels work on CUDA tensors, not on {device}"
    if op not in OPTIONS:
        return f"the CUDA backend has no {op}; it has {' and '.join(OPTIONS)}; use backend='triton'"
    if ask.dtype not in _DTYPES:
        return f"the CUDA kernels take float32, bfloat16 and float16, not {str(ask.dtype).removeprefix('torch.')}"
    lacks = ask.needs - OPTIONS[op]
    if lacks:
        return f"{op} in CUDA has no {', no '.join(f'`{need}`' for need in sorted(lacks))}; use backend='triton'"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return "the CUDA kernels need compute capability 8.0 or newer"
    if "variances" in ask.needs and ask.dtype == torch.float16:
        return (
            f"{op} in CUDA has no variances in float16, whose range the squares of features leave; use backend='triton'"
        )
    if "variances" in ask.needs and device.type == "cuda" and torch.cuda.get_device_capability(device) in _SMALL:
        return (
            f"{op} in CUDA has no variances on a device with 99 KB of shared memory for a block; use backend='triton'"
        )
    if {"variances", "dtemperature"} <= ask.needs and ask.dim > _MAX_VARIANCE_DIM:
        return (
            f"{op} in CUDA has no gradient of the temperature with variances beyond {_MAX_VARIANCE_DIM} channels: its float32 sums "
            "would be less accurate than PyTorch's; use backend='triton'"
        )
    if ask.num_classes > _MAX_CLASSES.get(op, ask.num_classes):
        return f"{op} in CUDA takes at most {_MAX_CLASSES[op]} classes"
    return missing()


def saves_logits(
    num_classes: int, dim: int, dtype: torch.dtype = torch.float32, learned_prototypes: bool = False
) -> bool:
    """Whether 4 K bytes per pixel are saved for the backward: where they are at most half of the features' bytes, and a block's 64 pixels
    are too many bytes to be found in L2 when they are read again, or the prototypes' gradient would have each of its blocks form them anew
    (counted in docs/gpu-evidence.md: features read 20 times instead of 2 at C in float32). Not yet measured on a GPU."""
    return num_classes * 8 <= dim * dtype.itemsize and (learned_prototypes or dim * dtype.itemsize > _CACHED_BYTES)


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
    """Whether loss and gradient are formed together. float16 gradients would underflow; sm_90 and sm_100 alone share 227 KB per block."""
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


# ---- prototype_contrastive_loss -----------------------------------------------------------------------------------


def saved_like(contrast: Contrast, wanted: Wanted) -> SavedLike:
    if _in_one_pass(contrast, wanted):
        return SavedLike(torch.float64, one_pass=True)
    return SavedLike(torch.float64, any(wanted) and _saves_logits(contrast, wanted))


def _saves_logits(c: Contrast, wanted: Wanted) -> bool:
    """A bias may be -inf: what is saved could not be taken apart again; nor could a variance term."""
    num_rows, dim = c.prototypes.shape[-2:]
    return c.bias is None and c.variances is None and saves_logits(num_rows, dim, c.features.dtype, wanted.prototypes)


def _in_one_pass(contrast: Contrast, wanted: Wanted) -> bool:
    """A map's incoming gradient is another for each pixel."""
    features_alone = wanted == Wanted(features=True) and not _has_options(contrast)
    return features_alone and contrast.reduction != "none" and takes_one_pass(contrast.features, contrast.num_classes)


def contrast_forward(contrast: Contrast, wanted: Wanted) -> tuple[Tensor, Saved]:
    c = contrast
    if _in_one_pass(c, wanted):
        loss, dfeatures = one_pass(c)
        denominator, lse, inv_norm, logits = (loss.new_empty(0) for _ in range(4))
        return loss, Saved(denominator, lse, inv_norm, logits, dfeatures)
    if c.features.numel() == 0:
        return reference.contrast_forward(c, wanted)
    loss, denominator, lse, inv_norm, logits = _ops.prototype_contrastive_forward(
        *_problem(c), label_flag(c.features.device), *_settings(c), c.denominator, c.reduction == "mean", c.reduction == "none",
        any(wanted), _saves_logits(c, wanted),
    )  # fmt: skip
    return loss, Saved(denominator, lse, inv_norm, logits, c.features.new_empty(0))


def contrast_backward(grad_loss: Tensor, contrast: Contrast, saved: Saved, wanted: Wanted) -> Gradients:
    c = contrast
    dfeatures = torch.empty_like(c.features) if wanted.features else c.features.new_empty(0)
    if c.features.numel() == 0:
        return Gradients(dfeatures, *_no_others(c, wanted))
    dprototypes, dbias, dtemperature = _ops.prototype_contrastive_backward(
        grad_loss.float(), *_problem(c), saved.lse.double(), saved.inv_norm, saved.logits, saved.denominator, dfeatures,
        label_flag(c.features.device), *_settings(c), *wanted,
    )  # fmt: skip
    return Gradients(dfeatures, dprototypes, dbias, dtemperature)


def _no_others(c: Contrast, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Of an empty batch."""
    shapes = (c.prototypes.shape, () if c.bias is None else c.bias.shape, ())
    dprototypes, dbias, dtemperature = (
        c.features.new_zeros(shape if wants else 0, dtype=torch.float32)
        for shape, wants in zip(shapes, wanted[1:], strict=True)
    )
    return dprototypes, dbias, dtemperature


def _targets(c: Contrast) -> Tensor:
    """Classes or probabilities: `why_not` refuses a teacher."""
    assert isinstance(c.labels, Tensor)
    return c.labels


def _problem(c: Contrast) -> tuple[Tensor | None, ...]:
    """features, labels or probabilities, prototypes, class_weight, pixel_weight as the kernels take them."""
    labels = _targets(c)
    labels = labels if labels.dim() == 3 or labels.dtype in _DTYPES else labels.float()
    return c.features, labels, c.prototypes.to(c.features.dtype).contiguous(), _plain(c.class_weight), c.pixel_weight


def _settings(c: Contrast) -> tuple:
    """From the temperature to the kind of loss. A tensor of the temperature is read where it is."""
    tensor = c.temperature.float() if isinstance(c.temperature, Tensor) else None
    weight_sum = None if c.label_smoothing == 0 or c.class_weight is None else c.class_weight.float().sum()
    number = 1.0 if tensor is not None else c.temperature
    return (
        number, c.normalize, c.ignore_index, _plain(c.bias), tensor, weight_sum, c.label_smoothing, c.margin, c.loss == "sigmoid",
        None if c.variances is None else c.variances.to(c.features.dtype).contiguous(), c.positive_variance,
    )  # fmt: skip


def _has_options(c: Contrast) -> bool:
    return (
        c.bias is not None or c.variances is not None or c.prototypes.dim() == 3 or _targets(c).dim() == 4
        or isinstance(c.temperature, Tensor)
        or c.denominator is not None or c.label_smoothing != 0 or c.margin != 0 or c.loss != "softmax"
    )  # fmt: skip


def contrast_scale(dfeatures: Tensor, grad_loss: Tensor) -> None:
    """Where grad_loss is 1, which only the device knows, nothing is read or written."""
    if dfeatures.numel():
        _ops.prototype_contrastive_scale(dfeatures, grad_loss.float())


def one_pass(c: Contrast) -> tuple[Tensor, Tensor]:
    """-> loss [], dfeatures (features' dtype and layout) for an incoming gradient of 1. reduction: "mean" or "sum"."""
    dfeatures = torch.empty_like(c.features)
    if c.features.numel() == 0:
        return c.features.new_zeros((), dtype=torch.float32), dfeatures
    loss = _ops.prototype_contrastive_one_pass(
        c.features, c.labels, c.prototypes.to(c.features.dtype).contiguous(), _plain(c.class_weight), c.pixel_weight, dfeatures,
        label_flag(c.features.device), c.temperature, c.normalize, c.ignore_index, c.reduction == "mean",
    )  # fmt: skip
    return loss, dfeatures


# ---- class_moments ------------------------------------------------------------------------------------------------


def class_moments(problem: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """A pixel with a bad label is left out and raises the flag."""
    p = problem
    weight = None if p.pixel_weight is None else p.pixel_weight.float().contiguous()
    return _ops.class_moments(
        p.features, p.labels, weight, label_flag(p.features.device), p.num_classes, p.normalize, p.squares, p.ignore_index
    )  # fmt: skip


def move_prototypes(prototypes: Tensor, problem: Moments, average: Average) -> None:
    """class_moments whose total moves `prototypes`: the sums never reach memory as a whole."""
    _ops.move_prototypes(
        prototypes, problem.features, problem.labels, label_flag(problem.features.device), *average, problem.normalize,
        problem.ignore_index,
    )  # fmt: skip


# ---- the up-sampled ops -------------------------------------------------------------------------------------------


def upsampled_cross_entropy(problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
    p, device = problem, problem.logits.device
    if p.labels.numel() == 0:
        loss = torch.zeros(p.labels.shape if p.reduction == "none" else (), dtype=torch.float32, device=device)
        return loss, torch.zeros(p.logits.shape if needs_dlogits else 0, dtype=torch.float32, device=device)
    return _ops.upsampled_cross_entropy(
        _within_32_bits(p.logits), p.labels, _plain(p.class_weight), None if p.pixel_weight is None else p.pixel_weight.float(),
        label_flag(device), p.temperature, p.align_corners, p.ignore_index, p.reduction == "mean", p.reduction == "none", needs_dlogits,
        p.denominator,
    )  # fmt: skip


def upsampled_prediction(problem: UpsampledClasses) -> tuple[Tensor, Tensor]:
    p = problem
    if p.logits.numel() == 0:
        shape = (p.logits.shape[0], *p.size)
        kind = torch.uint8 if p.logits.shape[1] <= 255 else torch.int32
        return p.logits.new_empty(shape, dtype=kind), p.logits.new_empty(shape, dtype=torch.float32)
    return _ops.upsampled_prediction(
        _within_32_bits(p.logits), *p.size, _plain(p.thresholds), p.temperature, p.align_corners, p.ignore_index
    )


def upsampled_confusion(problem: UpsampledClasses) -> Tensor:
    """A bad label is left out and raises the flag."""
    p, classes = problem, problem.logits.shape[1]
    assert p.labels is not None  # the confusion's rows
    # a label map has few classes: most pixels meet in few entries
    copies = max(1, min(_COPIES, _COPIED_ENTRIES // classes**2))
    counts = torch.zeros(copies, classes, classes, dtype=torch.int32, device=p.logits.device)
    if p.labels.numel():
        flag = label_flag(p.logits.device)
        _ops.upsampled_confusion(counts, _within_32_bits(p.logits), p.labels, flag, p.align_corners, p.ignore_index)
    return counts.sum(0, dtype=torch.int64)


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _within_32_bits(logits: Tensor) -> Tensor:
    """The kernels' offsets within one image and class; a view that is wider than that is copied, and low-resolution logits are small."""
    _, _, h, w = logits.shape
    return logits if (h - 1) * logits.stride(2) + (w - 1) * logits.stride(3) < 2**31 else logits.contiguous()
