"""The up-sampled ops: a few rows of the up-sampled map at a time, and the adjoint as two small matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import UpsampledClasses, UpsampledLoss
from ..labels import as_int64, check_probabilities, check_range
from .exact import exact, fixed_sum, matmul, wide, widened
from .targets import sigmoid, smoothed, softmax, softplus

_STRIP_ELEMENTS = 1 << 20  # values of an up-sampled strip alive at once: 4 MB


class Axis(NamedTuple):
    """For each position along one axis of the output: lower node, upper node, weight of the upper; as F.interpolate. An axis that keeps
    its size is not interpolated: there the upper node is the lower one."""

    lower: Tensor
    upper: Tensor
    weight: Tensor

    def part(self, rows: slice) -> Axis:
        return Axis(self.lower[rows], self.upper[rows], self.weight[rows])


def _axis(size: int, out: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Axis:
    position = torch.arange(out, dtype=torch.float64, device=device)
    if align_corners:
        position = position * (size - 1) / max(out - 1, 1)  # in this order: exact on nodes
    else:
        position = ((position + 0.5) * size / out - 0.5).clamp_min(0)
    lower = position.floor().long().clamp_(max=size - 1)
    upper = lower if size == out else (lower + 1).clamp_(max=size - 1)
    return Axis(lower, upper, (position - lower).to(dtype))


def _axes(
    low: Sequence[int], size: tuple[int, int], align_corners: bool, like: Tensor, dtype: torch.dtype
) -> tuple[Axis, Axis]:
    height, width = (_axis(*pair, align_corners, dtype, like.device) for pair in zip(low, size, strict=True))
    return height, width


def _matrix(axis: Axis, size: int) -> Tensor:
    """[out, size]: the interpolation along one axis as a matrix, for the adjoint."""
    lower, upper, weight = axis
    matrix = weight.new_zeros(len(lower), size)
    rows = torch.arange(len(lower), device=weight.device)
    matrix[rows, lower] += 1 - weight
    matrix[rows, upper] += weight  # where the nodes are one and the same the two add up to 1
    return matrix


class _Adjoint(NamedTuple):
    """Along one axis: the interpolation as a matrix, and as one of ones wherever a node is in a pixel's cell."""

    weights: Tensor
    cells: Tensor

    def part(self, rows: slice) -> _Adjoint:
        return _Adjoint(self.weights[rows], self.cells[rows])


def _adjoint(axis: Axis, size: int) -> _Adjoint:
    weights = _matrix(axis, size)
    return _Adjoint(weights, torch.zeros_like(weights).scatter_(1, torch.stack(axis[:2], 1), 1))


def _to_nodes(dstrip: Tensor, y: _Adjoint, x: _Adjoint) -> Tensor:
    """dstrip [K, rows, W] -> [K, h, w]. NaN spoils the nodes of its cell, not the whole map."""
    spoiled = dstrip.isnan()
    nodes = matmul(y.weights.T, matmul(dstrip.where(~spoiled, 0), x.weights))
    return nodes.masked_fill(y.cells.T @ (spoiled.to(dstrip.dtype) @ x.cells) > 0, torch.nan)


def _strips(height: int, row_elements: int) -> Iterator[slice]:
    rows = max(1, _STRIP_ELEMENTS // max(1, row_elements))
    return (slice(r, min(r + rows, height)) for r in range(0, height, rows))


def _between(lower: Tensor, upper: Tensor, weight: Tensor) -> Tensor:
    """As F.interpolate: NaN where a node of the cell is, also one of weight 0. But -inf of weight 0, a masked class, does not count."""
    return _part(lower, 1 - weight) + _part(upper, weight)


def _part(node: Tensor, weight: Tensor) -> Tensor:
    return torch.where((weight == 0) & (node == -torch.inf), 0, node * weight)


def _strip(image: Tensor, y: Axis, x: Axis) -> Tensor:
    """image [K, h, w] -> [K, rows, W]: a few rows of the up-sampled map."""
    rows = _between(image[:, y.lower], image[:, y.upper], y.weight[:, None])
    return _between(rows[:, :, x.lower], rows[:, :, x.upper], x.weight)


# ---- losses -------------------------------------------------------------------------------------------------------


class _Goal(NamedTuple):
    labelled: Tensor  # [B, H, W]
    index: Tensor | None  # [B, H, W]; None for probabilities
    factor: Tensor  # [B, H, W]: multiplies a pixel's loss
    counted: Tensor  # [B, H, W]: its part of the denominator
    any_bad: Tensor | None


def _is_soft(problem: UpsampledLoss, binary: bool) -> bool:
    return binary or problem.labels.is_floating_point() or problem.label_smoothing > 0


def _goal(problem: UpsampledLoss, binary: bool, dtype: torch.dtype) -> _Goal:
    p, num_classes = problem, problem.logits.shape[1]
    if p.labels.is_floating_point():
        any_bad = check_probabilities(p.labels)
        labelled = _has_probability(p, dtype)
        return _Goal(labelled, None, labelled.to(dtype), labelled.to(dtype), any_bad)
    labels = as_int64(p.labels)
    labelled, any_bad = check_range(labels, num_classes, p.ignore_index, p.labels)
    index, ones = labels.where(labelled, 0), labelled.to(dtype)
    weight = ones if p.class_weight is None else ones * p.class_weight.to(dtype)[index]
    return _Goal(labelled, index, ones if _is_soft(p, binary) else weight, ones if binary else weight, any_bad)


def _has_probability(problem: UpsampledLoss, dtype: torch.dtype) -> Tensor:
    labels, size = problem.labels, problem.output_size
    total = (labels != 0).any(1, keepdim=True).to(dtype)
    axes = _axes(labels.shape[-2:], size, problem.align_corners, labels, dtype)
    found = total.new_empty((len(total), *size))
    for b, image in enumerate(total):
        found[b] = _strip(image, *axes)[0]
    return found > 0


@exact
def upsampled_cross_entropy(problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
    return _loss(problem, needs_dlogits, binary=False)


@exact
def upsampled_binary_cross_entropy(problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
    return _loss(problem, needs_dlogits, binary=True)


def _loss(problem: UpsampledLoss, needs_dlogits: bool, binary: bool) -> tuple[Tensor, Tensor]:
    p, logits = problem, problem.logits
    dtype, (batch, num_classes, *low) = wide(logits.dtype), logits.shape
    height, width = p.output_size
    goal = _goal(p, binary, dtype)
    denominator = torch.ones((), dtype=torch.float64, device=logits.device)
    if p.reduction == "mean":
        denominator = fixed_sum(goal.counted) if p.denominator is None else p.denominator.double()
    inverse = torch.where(denominator == 0, 0, 1 / denominator)
    weight = goal.factor
    if p.pixel_weight is not None:
        weight = (weight * p.pixel_weight.to(dtype)).where(goal.labelled, 0)
    y, x = _axes(low, (height, width), p.align_corners, logits, dtype)
    of_rows, of_columns = _adjoint(y, low[0]), _adjoint(x, low[1])
    dlogits = logits.new_zeros(logits.shape if needs_dlogits else 0, dtype=dtype)
    nll = torch.zeros_like(weight) if p.reduction == "none" else None
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for b in range(batch):
        image = logits[b].to(dtype) / p.temperature
        for rows in _strips(height, num_classes * width):
            strip, labelled = _strip(image, y.part(rows), x), goal.labelled[b, rows]
            loss, residual = _pixels(strip, p, goal, (b, rows), binary, needs_dlogits)
            loss = (loss * weight[b, rows]).where(labelled, 0)
            if nll is None:
                total += fixed_sum(loss)
            else:
                nll[b, rows] = loss
            if needs_dlogits:
                assert residual is not None
                dstrip = (residual * (weight[b, rows] * (inverse / p.temperature).to(dtype))).where(labelled, 0)
                dlogits[b] += _to_nodes(dstrip, of_rows.part(rows), of_columns)
    loss = nll if nll is not None else (total * inverse).to(dtype)
    return loss if goal.any_bad is None else torch.where(goal.any_bad, torch.nan, loss), dlogits


def _pixels(
    strip: Tensor, problem: UpsampledLoss, goal: _Goal, where: tuple[int, slice], binary: bool, needs_residual: bool
) -> tuple[Tensor, Tensor | None]:
    """strip [K, rows, W] -> loss [rows, W] before factor and pixel weight, and its gradient in the strip."""
    if not _is_soft(problem, binary):
        assert goal.index is not None
        index = goal.index[where]
        lse = _logsumexp(strip)
        loss = lse - strip.gather(0, index[None])[0]
        if not needs_residual:
            return loss, None
        residual = softmax(strip)
        return loss, residual.scatter_add_(0, index[None], residual.new_full((1, 1, 1), -1.0).expand(1, *index.shape))
    target = _target(strip, problem, goal, where)
    terms, residual = (_binary if binary else _soft)(strip, target, problem)
    return terms.sum(0, dtype=torch.float64).to(strip.dtype), residual


def _target(strip: Tensor, problem: UpsampledLoss, goal: _Goal, where: tuple[int, slice]) -> Tensor:
    b, rows = where
    if goal.index is None:
        labels = problem.labels
        y, x = _axes(labels.shape[-2:], problem.output_size, problem.align_corners, labels, strip.dtype)
        return smoothed(_strip(labels[b].to(strip.dtype), y.part(rows), x), problem.label_smoothing)
    return smoothed(torch.zeros_like(strip).scatter_(0, goal.index[b, None, rows], 1.0), problem.label_smoothing)


def _logsumexp(strip: Tensor) -> Tensor:
    """NaN where a logit is inf, as in F.cross_entropy."""
    lse = strip.logsumexp(0)
    return lse.where(lse != torch.inf, torch.nan)


def _soft(strip: Tensor, target: Tensor, problem: UpsampledLoss) -> tuple[Tensor, Tensor]:
    if problem.class_weight is not None:
        target = target * problem.class_weight.to(strip.dtype)[:, None, None]
    terms = torch.where(target == 0, 0, target * (_logsumexp(strip) - strip))
    return terms, softmax(strip) * target.sum(0, dtype=torch.float64).to(strip.dtype) - target


def _power_of_sigmoid(z: Tensor, gamma: float) -> Tensor:
    """sigmoid(z)**gamma; torch's power has other bits where another thread ends."""
    return (gamma * torch.nn.functional.logsigmoid(z.double())).exp().to(z.dtype)


def _binary(strip: Tensor, target: Tensor, problem: UpsampledLoss) -> tuple[Tensor, Tensor]:
    """gamma > 0: focal, -(1 - q)^gamma log q with q the probability of what the target says; the target is 0 or 1 then."""
    weight = widened(problem.class_weight, strip.dtype)
    if problem.gamma:
        sign = 2 * target - 1
        log_q = torch.nn.functional.logsigmoid(sign * strip)
        q, miss = log_q.exp(), sigmoid(-sign * strip)
        focus = _power_of_sigmoid(-sign * strip, problem.gamma)
        q_log_q = torch.where(q == 0, 0, q * log_q)  # of an infinite loss, too
        terms, residual = -focus * log_q, sign * focus * (problem.gamma * q_log_q - miss)
        # at -inf the class is surely absent: 0 * inf is no number
        sure = (strip == -torch.inf) & (target == 0)
        terms, residual = terms.where(~sure, 0), residual.where(~sure, 0)
    else:
        terms = softplus(strip) - torch.where(target == 0, 0, target * strip)
        residual = sigmoid(strip) - target
    if weight is None:
        return terms, residual
    return terms * weight[:, None, None], residual * weight[:, None, None]


# ---- classes ------------------------------------------------------------------------------------------------------


@exact
def upsampled_prediction(problem: UpsampledClasses) -> tuple[Tensor, Tensor]:
    p, logits = problem, problem.logits
    dtype, (batch, num_classes, *low), (height, width) = wide(logits.dtype), logits.shape, p.size
    y, x = _axes(low, p.size, p.align_corners, logits, dtype)
    labels = torch.empty(batch, height, width, dtype=label_dtype(num_classes), device=logits.device)
    confidence = torch.empty(batch, height, width, dtype=torch.float32, device=logits.device)
    for b in range(batch):
        image = logits[b].to(dtype) / p.temperature
        for rows in _strips(height, num_classes * width):
            strip = _strip(image, y.part(rows), x)
            top, label = _inf_as_nan(strip).max(0)
            confidence[b, rows] = (top - strip.logsumexp(0)).exp()
            labels[b, rows] = label.to(labels.dtype)
        if p.thresholds is not None:
            enough = confidence[b] >= p.thresholds.to(torch.float32)[labels[b].long()]  # NaN is not enough
            labels[b].masked_fill_(~enough, p.ignore_index)
    return labels, confidence


def _inf_as_nan(strip: Tensor) -> Tensor:
    """Which of the two a pixel near an infinite node has depends on how it is interpolated: the largest is the first class with either."""
    return strip.where(strip != torch.inf, torch.nan)


def label_dtype(num_classes: int) -> torch.dtype:
    """Of predicted labels: uint8 up to 255 classes, int32 beyond."""
    return torch.uint8 if num_classes <= 255 else torch.int32


@exact
def upsampled_confusion(problem: UpsampledClasses) -> Tensor:
    p, logits = problem, problem.logits
    dtype, (batch, num_classes, *low), (height, width) = wide(logits.dtype), logits.shape, p.size
    assert p.labels is not None  # the confusion's rows
    labels = as_int64(p.labels)
    labelled, _ = check_range(labels, num_classes, p.ignore_index, p.labels)
    y, x = _axes(low, p.size, p.align_corners, logits, dtype)
    counts = torch.zeros(num_classes * num_classes + 1, dtype=torch.int64, device=logits.device)  # the last: unlabelled
    for b in range(batch):
        image = logits[b].to(dtype)
        for rows in _strips(height, num_classes * width):
            pair = labels[b, rows] * num_classes + _inf_as_nan(_strip(image, y.part(rows), x)).argmax(0)
            pair = pair.where(labelled[b, rows], num_classes * num_classes).flatten()
            counts.scatter_add_(0, pair, torch.ones_like(pair))
    return counts[:-1].view(num_classes, num_classes)
