"""The C++ backend ("cpu"): csrc/ through torch.ops.spcl_fast_cpu, on CPU tensors.

One pass over the features in the forward, one in the backward; the only feature-sized allocation is the gradient. Where the logits of
all classes do not fit a tile, or a teacher computes the targets, the classes are streamed past the pixels (csrc/cpu/streamed_*.cpp) and
nothing of [pixels, classes] is there. The up-sampled ops allocate no up-sampled map: results of the labels' size and, for the gradient,
at most twice the logits in float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import reference
from .built import BUILT, build_record
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
    Teacher,
    UpsampledClasses,
    UpsampledLoss,
    Wanted,
)
from .labels import bad_label_message, check_probabilities

_ROWS = {"variances", "per_image_prototypes", "bias", "tensor_temperature", "prototype_class", "dbias", "dtemperature"}
_LOSS = {"probabilities", "label_smoothing", "denominator"}
OPTIONS = {  # the ops, and the options that each has
    "prototype_contrastive_loss": _ROWS | _LOSS | {"teacher", "margin", "no_positive_variance", "sigmoid"},
    "class_moments": {"pixel_weight"},
    "upsampled_cross_entropy": _LOSS,
    "upsampled_prediction": {"int32_labels"},
    "prototype_logits": _ROWS,
    "upsampled_confusion": set(),
    "upsampled_binary_cross_entropy": _LOSS | {"focal"},
    "balance_": set(),
}
_TILE_ROWS = 4096  # more classes are streamed: up to here a panel's logits and their weights fit an L2 cache
_LARGE_BYTES = 4 << 20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REDUCTIONS = ("mean", "sum", "none")


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
    if ask.op not in OPTIONS:
        return f"the C++ backend has no {ask.op}; it has {' and '.join(OPTIONS)}"
    if ask.device.type != "cpu":
        return f"the C++ backend works on CPU tensors, not on {ask.device}"
    if ask.dtype not in _DTYPES:
        return f"the C++ backend takes float32, bfloat16 and float16 features, not {ask.dtype}; the reference backend takes float64"
    missing = ask.needs - OPTIONS[ask.op]
    if missing:
        return f"the C++ backend's {ask.op} has no {', no '.join(f'`{need}`' for need in sorted(missing))}; the reference backend has"
    return None


# ---- prototype_contrastive_loss -----------------------------------------------------------------------------------


def saves_logits(num_rows: int, dim: int) -> bool:
    """Whether the forward keeps the logits: where 4 M bytes per pixel out and in beat a second product, measured, from D of about 100 on,
    with AVX2's fewer lanes from 64 on. Never more than a third of the features' bytes. The results have the same bits either way."""
    return dim >= (64 if _level() == "avx2" else 128) and num_rows * 3 <= dim


@functools.cache
def _level() -> str:
    from .. import _cpu

    return _cpu.cpu_capability()


def saved_like(contrast: Contrast, wanted: Wanted) -> SavedLike:
    if _streams(contrast):
        return SavedLike(torch.float64)
    return SavedLike(torch.float32, any(wanted) and saves_logits(*contrast.prototypes.shape[-2:]))


def contrast_forward(contrast: Contrast, wanted: Wanted) -> tuple[Tensor, Saved]:
    c, no_gradient = contrast, contrast.features.new_empty(0)
    reduction, save = _REDUCTIONS.index(c.reduction), any(wanted)
    if _streams(c):
        operands = _streamed_operands(c)
        loss, denominator, lse, inv_norm, report = _ops.streamed_forward(
            *operands[:7], _floats(c.denominator), *operands[7:], reduction, save
        )
        saved = Saved(denominator, lse, inv_norm, denominator.new_empty(0), no_gradient)
    else:
        loss, denominator, lse, inv_norm, logits, report = _ops.prototype_contrastive_forward(
            c.features, _labels(c), *_contrast_operands(c), _floats(c.denominator), *_settings(c), reduction, save,
            saves_logits(*c.prototypes.shape[-2:]),
        )  # fmt: skip
        saved = Saved(denominator, lse, inv_norm, logits, no_gradient)
    _raise_for(report, c)
    return loss, saved


def contrast_backward(grad_loss: Tensor, contrast: Contrast, saved: Saved, wanted: Wanted) -> Gradients:
    c, grad_loss = contrast, grad_loss.detach().to(torch.float32)
    dfeatures = _empty_gradient(c.features) if wanted.features else c.features.new_empty(0)
    if _streams(c):
        operands = _streamed_operands(c)
        small = _ops.streamed_backward(
            grad_loss,
            *operands[:-4],
            saved.lse,
            saved.inv_norm,
            saved.denominator,
            dfeatures,
            *operands[-4:],
            list(wanted),
        )
    else:
        small = _ops.prototype_contrastive_backward(
            grad_loss, c.features, _labels(c), *_contrast_operands(c), saved.lse, saved.inv_norm, saved.logits, saved.denominator,
            dfeatures, *_settings(c), list(wanted),
        )  # fmt: skip
    return Gradients(dfeatures, *small)


def _streams(c: Contrast) -> bool:
    """Whether classes are streamed past the pixels; else a tile of pixels holds the logits of all of them."""
    if isinstance(c.labels, Teacher):
        return True
    of_rows = c.prototype_class is not None or (c.variances is not None and not c.positive_variance)
    return c.prototypes.shape[-2] > _TILE_ROWS and not (of_rows or c.labels.is_floating_point())


def _labels(c: Contrast) -> Tensor:
    assert isinstance(c.labels, Tensor)  # a Teacher is streamed
    labels = c.labels.detach()
    return labels if labels.dtype in _DTYPES or not labels.is_floating_point() else labels.to(torch.float32)


def _contrast_operands(c: Contrast) -> tuple[Tensor | None, ...]:
    return _plain(c.prototypes), _plain(c.class_weight), _floats(c.pixel_weight), *_row_operands(c)


def _row_operands(c: Contrast | Logits) -> tuple[Tensor | None, ...]:
    pooled = None if c.prototype_class is None else c.prototype_class.to(torch.int64).contiguous()
    return _plain(c.bias), _plain(c.variances), pooled


def _settings(c: Contrast) -> tuple[list[float], list[int]]:
    """ContrastSettings of csrc/cpu/bind_contrast.h."""
    numbers = [_number(c.temperature), c.label_smoothing, c.margin]
    return numbers, [
        c.normalize, c.ignore_index, c.num_classes, c.loss == "sigmoid", c.pool == "max", c.positive_variance,
    ]  # fmt: skip


def _streamed_operands(c: Contrast) -> tuple:
    """What the streamed forward and backward share, in the order of their schemas: seven operands, the teacher's four, four settings."""
    teacher = c.labels if isinstance(c.labels, Teacher) else None
    labels = None if teacher else c.labels
    shared = (
        c.features, labels, _plain(c.prototypes), _plain(c.class_weight), _floats(c.pixel_weight), _plain(c.bias), _plain(c.variances),
    )  # fmt: skip
    numbers = [_number(c.temperature), c.label_smoothing, c.margin, teacher.temperature if teacher else 1.0]
    settings = (numbers, c.normalize, c.loss == "sigmoid", c.ignore_index)
    if teacher is None:
        return *shared, None, None, None, None, *settings
    return (
        *shared,
        teacher.features.detach(),
        _plain(teacher.prototypes),
        teacher.u.detach().to(torch.float64).contiguous(),
        _plain(teacher.v),
        *settings,
    )


contrast_scale = reference.contrast_scale


# ---- prototype_logits ---------------------------------------------------------------------------------------------


def logits_forward(problem: Logits) -> Tensor:
    p, (batch, _, height, width) = problem, problem.features.shape
    logits = _ops.prototype_logits_forward(p.features, _plain(p.prototypes), *_row_operands(p), *_logits_settings(p))
    return logits.view(batch, p.num_classes, height, width)


def logits_backward(grad_logits: Tensor, problem: Logits, wanted: Wanted) -> Gradients:
    p = problem
    dfeatures = _empty_gradient(p.features) if wanted.features else p.features.new_empty(0)
    small = _ops.prototype_logits_backward(
        _floats(grad_logits), p.features, _plain(p.prototypes), *_row_operands(p), dfeatures, *_logits_settings(p), list(wanted)
    )  # fmt: skip
    return Gradients(dfeatures, *small)


def _logits_settings(p: Logits) -> tuple[list[float], list[int]]:
    return [_number(p.temperature), 0.0, 0.0], [p.normalize, 0, p.num_classes, False, p.pool == "max", True]


# ---- class_moments ------------------------------------------------------------------------------------------------


def class_moments(problem: Moments) -> tuple[Tensor, Tensor, Tensor]:
    p = problem
    sums, counts, squares, report = _ops.class_moments(
        p.features, p.labels, _floats(p.pixel_weight), p.num_classes, p.normalize, p.squares, p.ignore_index
    )
    _raise_for_label(report, p.labels, p.num_classes, p.ignore_index)
    return sums, counts, squares


def move_prototypes(prototypes: Tensor, problem: Moments, average: Average) -> None:
    prototypes.copy_(average.moved(prototypes, *class_moments(problem)[:2]))


# ---- the up-sampled ops -------------------------------------------------------------------------------------------


def upsampled_cross_entropy(problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
    return _upsampled_loss(problem, needs_dlogits, binary=False)


def upsampled_binary_cross_entropy(problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
    return _upsampled_loss(problem, needs_dlogits, binary=True)


def _upsampled_loss(problem: UpsampledLoss, needs_dlogits: bool, binary: bool) -> tuple[Tensor, Tensor]:
    p, labels = problem, problem.labels.detach()
    if labels.is_floating_point():
        check_probabilities(labels)
        labels = labels if labels.dtype in _DTYPES else labels.to(torch.float32)
    loss, dlogits, report = _ops.upsampled_loss_forward(
        p.logits.detach(), labels, _plain(p.class_weight), _floats(p.pixel_weight), _floats(p.denominator), *p.output_size,
        [p.temperature, p.label_smoothing, p.gamma], p.align_corners, p.ignore_index, p.reduction == "mean", p.reduction == "none",
        binary, needs_dlogits,
    )  # fmt: skip
    _raise_for_label(report, p.labels, p.logits.shape[1], p.ignore_index)
    return loss, dlogits


def upsampled_prediction(problem: UpsampledClasses) -> tuple[Tensor, Tensor]:
    p = problem
    return _ops.upsampled_prediction(
        p.logits.detach(), *p.size, _plain(p.thresholds), p.temperature, p.align_corners, p.ignore_index
    )


def upsampled_confusion(problem: UpsampledClasses) -> Tensor:
    p = problem
    counts, report = _ops.upsampled_confusion(p.logits.detach(), p.labels, p.align_corners, p.ignore_index)
    _raise_for_label(report, p.labels, p.logits.shape[1], p.ignore_index)
    return counts


# ---- balance_ -----------------------------------------------------------------------------------------------------


def balance_rows(problem: Balance, v: Tensor) -> Tensor:
    return _log_sum_exp(problem.features, problem.prototypes, v, problem.temperature)


def balance_columns(problem: Balance, u: Tensor) -> Tensor:
    return _log_sum_exp(problem.prototypes, problem.features, u, problem.temperature)


def _log_sum_exp(rows: Tensor, streamed: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """[N, E], [K, E], [K] -> [N] float32: each row against all of `streamed`."""
    pixels = rows.detach() if rows.dtype in _DTYPES else rows.detach().to(torch.float32)
    return _ops.streamed_log_sum_exp(pixels.t()[None, :, :, None], _plain(streamed), _plain(bias), temperature)[0].to(
        bias.dtype
    )


# ---- tensors as the kernels take them -----------------------------------------------------------------------------


def _empty_gradient(features: Tensor) -> Tensor:
    """torch.empty_like; a large one from huge pages that the next gradient uses again, since page faults cost more than the arithmetic."""
    if features.numel() * features.element_size() < _LARGE_BYTES:
        return torch.empty_like(features)
    return _ops.empty_gradient(features, torch.empty_like(features, device="meta").stride())


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float32)


def _plain(tensor: Tensor | None) -> Tensor | None:
    """float32 and contiguous: K rows, small."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.requires_grad):
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def _raise_for(report: Tensor, c: Contrast) -> None:
    if isinstance(c.labels, Tensor) and c.labels.is_floating_point():
        if report[0]:
            check_probabilities(c.labels)
        return
    _raise_for_label(report, c.labels, c.num_classes, c.ignore_index)


def _raise_for_label(report: Tensor, labels: object, num_classes: int, ignore_index: int) -> None:
    found, _, *pixel = report.tolist()
    if found:
        assert isinstance(labels, Tensor)
        value = int(labels[tuple(pixel)].item())  # the report's is int64, which does not hold every uint64
        raise ValueError(bad_label_message(value, tuple(pixel), num_classes, ignore_index))
