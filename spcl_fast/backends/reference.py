"""Everything of contract.py in plain PyTorch: the formulas, on any device, in float64 too.

Features are [B, D, h, w] with any strides; labels [B, H, W] of any integer dtype and size, read by the nearest rule where the size
differs; weights are float32; accumulation is float32, or float64 for float64 features. "P" stands for h*w pixels of an image.
One image at a time, so that a temporary is never larger than one image's features.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

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
from .labels import check_range, resize_nearest

_EPS = 1e-12  # of F.normalize
_STRIP_ELEMENTS = 1 << 20  # values of an up-sampled strip alive at once: 4 MB


def why_not(ask: Ask) -> str | None:
    return None


def saves_logits(num_classes: int, dim: int) -> bool:
    return num_classes * 4 <= dim


def saved_like(contrast: Contrast, wanted: Wanted) -> SavedLike:
    return SavedLike(_wide(contrast.features.dtype), any(wanted) and saves_logits(*contrast.prototypes.shape))


def _exact(function):
    """Run without autocast and without recording: a loss under autocast is still a float32 loss."""

    @functools.wraps(function)
    def run(*args):
        values = next(arg for arg in args if isinstance(arg, tuple))[
            0
        ]  # features or logits: the first field of every struct
        with torch.no_grad(), torch.autocast(values.device.type, enabled=False), _order_of_sums_kept(values):
            return function(*args)

    return run


@contextlib.contextmanager
def _order_of_sums_kept(features: Tensor):
    """Float64 has nothing wider to be summed in, so the order of a sum is seen in it: on the CPU one thread does it all."""
    threads = torch.get_num_threads()
    if features.device.type != "cpu" or features.dtype != torch.float64 or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, on the CPU summed in float64: a threaded GEMM splits its sums by the number of threads, which must not be seen."""
    return a @ b if a.device.type != "cpu" else (a.double() @ b.double()).to(a.dtype)


def _fixed_sum(values: Tensor) -> Tensor:
    """A sum in float64, whose order cannot be seen in the float32 result: the same bits for any number of threads."""
    return values.sum(dtype=torch.float64)


# ---- prototype_contrastive_loss -----------------------------------------------------------------------------------


def _image_logits(
    x: Tensor, prototypes: Tensor, variances: Tensor | None, temperature: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """x [D, P] -> logits [K, P], inv_norm [P]."""
    inv = 1 / x.norm(dim=0).clamp_min(_EPS) if normalize else torch.ones_like(x[0])
    logits = _matmul(prototypes, x) * (inv / temperature)
    if variances is not None:  # SePiCo's DistCL: + 1/2 x̂² · Σ / τ²
        logits += _matmul(variances, x.square()) * (0.5 * inv.square() / temperature**2)
    return logits, inv


@_exact
def contrast_forward(contrast: Contrast, wanted: Wanted) -> tuple[Tensor, Saved]:
    features, labels, prototypes, class_weight, pixel_weight, variances, *_ = contrast
    temperature, normalize, ignore_index, reduction = contrast[6:10]
    save = any(wanted)
    wide, (batch, _, height, width) = _wide(features.dtype), features.shape
    num_classes = prototypes.shape[0]
    given, labels = labels.shape[-2:], resize_nearest(labels, height, width).long()
    labelled, any_bad = check_range(labels, num_classes, ignore_index, given)
    target = labels.where(labelled, 0).flatten(1)
    weight = pixel_scale(labelled, target, class_weight, None, wide)
    prototypes = prototypes.to(wide)
    variances = None if variances is None else variances.to(wide)

    nll = features.new_zeros(batch, height * width, dtype=wide)
    lse, inv = torch.zeros_like(nll), torch.zeros_like(nll)
    logits = nll.new_zeros((batch, num_classes, height * width) if save and saves_logits(*prototypes.shape) else 0)
    for b in range(batch):
        z, inv[b] = _image_logits(features[b].flatten(1).to(wide), prototypes, variances, temperature, normalize)
        lse[b] = z.logsumexp(0)
        nll[b] = (lse[b] - z.gather(0, target[b, None])[0]).where(labelled[b].flatten(), 0)
        if logits.numel():
            logits[b] = z
    weighted = nll * weight if pixel_weight is None else nll * weight * pixel_weight.flatten(1).to(wide)
    weighted = weighted.where(labelled.flatten(1), 0)
    denominator = _fixed_sum(weight).to(wide) if reduction == "mean" else nll.new_ones(())
    if reduction == "none":
        loss = weighted.view(batch, height, width)
    else:
        loss = (_fixed_sum(weighted) / torch.where(denominator == 0, 1, denominator)).to(wide)
    if any_bad is not None:
        loss = torch.where(any_bad, torch.nan, loss)
    if not save:
        lse, inv, logits = nll.new_empty(0), nll.new_empty(0), nll.new_empty(0)
    return loss, Saved(denominator, lse, inv, logits, features.new_empty(0))


def pixel_scale(
    labelled: Tensor, target: Tensor, class_weight: Tensor | None, pixel_weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[B, P]: class weight x pixel weight of each labelled pixel, 0 elsewhere."""
    weight = labelled.flatten(1).to(dtype)
    if class_weight is not None:
        weight = weight * class_weight.to(dtype)[target]
    if pixel_weight is not None:
        weight = (weight * pixel_weight.flatten(1).to(dtype)).where(labelled.flatten(1), 0)
    return weight


@_exact
def contrast_backward(grad_loss: Tensor, contrast: Contrast, saved: Saved, wanted: Wanted) -> Gradients:
    features, labels, prototypes, class_weight, pixel_weight, variances, *_ = contrast
    temperature, normalize, ignore_index, reduction = contrast[6:10]
    denominator, _, inv_norm, logits, _ = saved
    needs_dfeatures, needs_dprototypes = wanted.features, wanted.prototypes
    wide, (batch, dim, height, width) = _wide(features.dtype), features.shape
    num_classes = prototypes.shape[0]
    labels = resize_nearest(labels, height, width).long()
    labelled = ((labels != ignore_index) & (labels >= 0) & (labels < num_classes)).flatten(1)
    target = labels.flatten(1).where(labelled, 0)
    scale = pixel_scale(labelled, target, class_weight, pixel_weight, wide)
    scale = scale * (grad_loss.flatten(1) if reduction == "none" else grad_loss).to(wide)
    scale = torch.where(denominator == 0, 0, scale / denominator)
    prototypes = prototypes.to(wide)
    variances = None if variances is None else variances.to(wide)

    dfeatures = torch.empty_like(features) if needs_dfeatures else features.new_empty(0)
    dprototypes = prototypes.new_zeros(prototypes.shape if needs_dprototypes else 0)
    for b in range(batch):
        x = features[b].flatten(1).to(wide)
        z = logits[b] if logits.numel() else _image_logits(x, prototypes, variances, temperature, normalize)[0]
        weight = (z - z.amax(0)).exp()  # not (z - lse).exp(): lse is rounded, which at a low temperature would be seen
        weight /= weight.sum(0, dtype=torch.float64).to(wide)
        weight.scatter_add_(0, target[b, None], weight.new_full((1, 1), -1.0).expand(1, weight.shape[1]))
        weight = (weight * scale[b]).where(labelled[b], 0)
        unit = x.mul_(inv_norm[b]) if x.dtype != features.dtype else x * inv_norm[b]
        if needs_dprototypes:
            dprototypes += _matmul(weight, unit.where(labelled[b], 0).T) / temperature
        if needs_dfeatures:
            dunit = _matmul(prototypes.T, weight) / temperature
            if variances is not None:
                dunit += unit * _matmul(variances.T, weight) / temperature**2
            if normalize:
                radial = (unit * dunit).sum(0).where(inv_norm[b] < 1 / _EPS, 0)  # a clamped norm is a constant
                dunit -= radial * unit
            dx = (dunit * inv_norm[b]).where(labelled[b], 0)
            dfeatures[b].copy_(dx.view(dim, height, width))
    return Gradients(dfeatures, dprototypes, *no_gradients(saved))


def contrast_scale(dfeatures: Tensor, grad_loss: Tensor) -> None:
    dfeatures.mul_(grad_loss)


# ---- class_moments ------------------------------------------------------------------------------------------------


@_exact
def class_moments(problem: Moments) -> tuple[Tensor, Tensor, Tensor]:
    features, labels, num_classes, normalize, ignore_index, squares, _ = problem
    wide, (batch, dim, height, width) = _wide(features.dtype), features.shape
    given, labels = labels.shape[-2:], resize_nearest(labels, height, width).long()
    labelled, _ = check_range(labels, num_classes, ignore_index, given)
    target = labels.where(labelled, num_classes).flatten(1)  # the unlabelled go to a row that is dropped
    sums = features.new_zeros(num_classes + 1, dim, dtype=torch.float64)
    square_sums = torch.zeros_like(sums) if squares else None
    for b in range(batch):
        x = features[b].flatten(1).to(wide)
        if normalize:
            x = x / x.norm(dim=0).clamp_min(_EPS)
        x = x.T.double()
        sums.index_add_(0, target[b], x)
        if squares:
            square_sums.index_add_(0, target[b], x.square())
    counts = target.new_zeros(num_classes + 1).scatter_add_(0, target.flatten(), torch.ones_like(target.flatten()))
    square_sums = square_sums[:num_classes].float() if squares else sums.new_empty(0, dtype=torch.float32)
    return sums[:num_classes].float(), counts[:num_classes].clone(), square_sums


def move_prototypes(prototypes: Tensor, problem: Moments, average: Average) -> None:
    prototypes.copy_(average.moved(prototypes, *class_moments(problem)[:2]))


# ---- upsampled_cross_entropy and upsampled_prediction -------------------------------------------------------------


def _bilinear(
    size: int, out: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `out` positions along one axis of `size` nodes: lower node, upper node, weight of the upper; as F.interpolate."""
    position = torch.arange(out, dtype=torch.float64, device=device)
    if align_corners:
        position = position * ((size - 1) / (out - 1) if out > 1 else 0.0)
    else:
        position = ((position + 0.5) * (size / out) - 0.5).clamp_min(0)
    lower = position.floor().long().clamp_(max=size - 1)
    upper = (lower + 1).clamp_(max=size - 1)
    return lower, upper, (position - lower).to(dtype)


def _axis_matrix(axis: tuple[Tensor, Tensor, Tensor], size: int) -> Tensor:
    """[out, size]: the interpolation along one axis as a matrix, for the adjoint."""
    lower, upper, weight = axis
    matrix = weight.new_zeros(len(lower), size)
    rows = torch.arange(len(lower), device=weight.device)
    matrix[rows, lower] += 1 - weight
    matrix[rows, upper] += weight  # where the nodes are one and the same the two add up to 1
    return matrix


def _strips(height: int, row_elements: int):
    rows = max(1, _STRIP_ELEMENTS // max(1, row_elements))
    return (slice(r, min(r + rows, height)) for r in range(0, height, rows))


def _upsampled_strip(image: Tensor, rows: slice, y_axis, x_axis) -> Tensor:
    """image [K, h, w] -> [K, rows, W]: a few rows of the up-sampled map."""
    lower, upper, weight = (part[rows] for part in y_axis)
    weight = weight[:, None]
    strip = image[:, lower] * (1 - weight) + image[:, upper] * weight
    lower, upper, weight = x_axis
    return strip[:, :, lower] * (1 - weight) + strip[:, :, upper] * weight


@_exact
def upsampled_cross_entropy(problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
    logits, labels, class_weight, pixel_weight, temperature, align_corners, ignore_index, reduction, *_ = problem
    wide, (batch, num_classes, low_height, low_width) = _wide(logits.dtype), logits.shape
    height, width = labels.shape[-2:]
    labels = labels.long()
    labelled, any_bad = check_range(labels, num_classes, ignore_index)
    target = labels.where(labelled, 0)
    weight = pixel_scale(labelled, target.flatten(1), class_weight, None, wide).view(labels.shape)
    denominator = (
        _fixed_sum(weight) if reduction == "mean" else torch.ones((), dtype=torch.float64, device=logits.device)
    )
    inverse = torch.where(denominator == 0, 0, 1 / denominator)
    if pixel_weight is not None:
        weight = (weight * pixel_weight.to(wide)).where(labelled, 0)
    y_axis = _bilinear(low_height, height, align_corners, wide, logits.device)
    x_axis = _bilinear(low_width, width, align_corners, wide, logits.device)
    y_matrix, x_matrix = _axis_matrix(y_axis, low_height), _axis_matrix(x_axis, low_width)

    dlogits = logits.new_zeros(logits.shape if needs_dlogits else 0, dtype=wide)
    nll = torch.zeros_like(weight) if reduction == "none" else None
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for b in range(batch):
        image = logits[b].to(wide) / temperature
        for rows in _strips(height, num_classes * width):
            strip = _upsampled_strip(image, rows, y_axis, x_axis)
            lse = strip.logsumexp(0)
            loss = ((lse - strip.gather(0, target[b, None, rows])[0]) * weight[b, rows]).where(labelled[b, rows], 0)
            if nll is None:
                total += _fixed_sum(loss)
            else:
                nll[b, rows] = loss
            if needs_dlogits:
                dstrip = strip.sub_(lse).exp_()
                dstrip.scatter_add_(
                    0, target[b, None, rows], dstrip.new_full((1, 1, 1), -1.0).expand(1, *dstrip.shape[1:])
                )
                dstrip = (dstrip * (weight[b, rows] * (inverse / temperature).to(wide))).where(labelled[b, rows], 0)
                dlogits[b] += _matmul(y_matrix[rows].T, _matmul(dstrip, x_matrix))
    loss = nll if nll is not None else (total * inverse).to(wide)
    if any_bad is not None:
        loss = torch.where(any_bad, torch.nan, loss)
    return loss, dlogits


@_exact
def upsampled_prediction(problem: UpsampledClasses) -> tuple[Tensor, Tensor]:
    logits, size, align_corners, ignore_index, temperature, thresholds, _ = problem
    wide, (batch, num_classes, low_height, low_width) = _wide(logits.dtype), logits.shape
    height, width = size
    y_axis = _bilinear(low_height, height, align_corners, wide, logits.device)
    x_axis = _bilinear(low_width, width, align_corners, wide, logits.device)
    labels = torch.empty(batch, height, width, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(batch, height, width, dtype=torch.float32, device=logits.device)
    for b in range(batch):
        image = logits[b].to(wide) / temperature
        for rows in _strips(height, num_classes * width):
            strip = _upsampled_strip(image, rows, y_axis, x_axis)
            top, label = strip.max(0)
            confidence[b, rows] = (top - strip.logsumexp(0)).exp()
            labels[b, rows] = label
        if thresholds is not None:
            below = confidence[b] < thresholds.to(torch.float32)[labels[b].long()]
            labels[b].masked_fill_(below, ignore_index)
    return labels, confidence
