"""InfoNCE of every pair of one label against the rows of all other labels, block by block: no [N, R] similarities are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import checks, dispatched

_AT_ONCE = 1 << 20  # similarities that are alive: 4 MB


def pair_info_nce(
    anchors: Tensor,  # [N, D]
    labels: Tensor,  # [N], integer
    rows: Tensor | None = None,  # [R, D]; None: the anchors, and none is a row of itself
    row_labels: Tensor | None = None,  # [R]
    *,
    temperature: float,
) -> Tensor:  # []
    """Mean over pairs (n, p) of one label of  log(1 + exp(m_n - s_np)),   m_n = log sum over rows of other labels of exp s_n.,
    s = <anchor, row> / temperature.

    anchors [N, D], labels [N]; rows [R, D], row_labels [R] (None: the anchors, and none is a row of itself) -> [].
    Used as they are: normalise before. Differentiable once, in anchors and rows. No pair, or no row of another label: 0.
    Memory: the gradients, and 4 MB of similarities at a time. Plain PyTorch.
    Source: van den Oord et al., arXiv 1807.03748; Chen et al., arXiv 2002.05709 (NT-Xent); Khosla et al., arXiv 2004.11362.
    """
    if (rows is None) != (row_labels is None):
        raise ValueError("pair_info_nce: rows and row_labels belong together; give both or neither")
    if rows is None or row_labels is None:
        return _recorded(anchors, labels, None, None, float(temperature))[0]
    if rows.shape[1:] != anchors.shape[1:] or labels.shape != anchors.shape[:1] or row_labels.shape != rows.shape[:1]:
        raise ValueError(
            f"pair_info_nce: expected anchors [N, D] with labels [N], rows [R, D] with row_labels [R], got {list(anchors.shape)}, "
            f"{list(labels.shape)}, {list(rows.shape)} and {list(row_labels.shape)}"
        )
    return _recorded(anchors, labels, rows, row_labels, float(temperature))[0]


class _PairInfoNCE:
    """(loss [], what a pair counts for []). rows and row_labels None: the anchors."""

    @staticmethod
    def compute(anchors, labels, rows, row_labels, temperature):
        given, is_self = _Given.of(anchors, labels, rows, row_labels), rows is None
        total, pairs = given.anchors.new_zeros(()), labels.new_zeros(())
        opposed = labels.new_zeros((), dtype=torch.bool)
        for here, positive, negative in _blocks(labels, given.row_labels, is_self):
            score, level = _scores(given.anchors[here], given.rows, negative, temperature)
            total += torch.logaddexp(level - score, score.new_zeros(())).where(positive, 0).sum()
            pairs += positive.sum()
            opposed |= negative.any()
        share = (pairs.clamp_min(1).to(total.dtype).reciprocal()).where(opposed, 0)
        return total * share, share

    @staticmethod
    def keep(ctx, inputs, output):
        *tensors, ctx.temperature = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        anchors, labels, rows, row_labels, share = ctx.saved_tensors
        given, is_self = _Given.of(anchors, labels, rows, row_labels), rows is None
        d_anchors, d_rows = torch.zeros_like(given.anchors), torch.zeros_like(given.rows)
        scale = grad * share / ctx.temperature
        for here, positive, negative in _blocks(labels, given.row_labels, is_self):
            score, level = _scores(given.anchors[here], given.rows, negative, ctx.temperature)
            pull = (level - score).sigmoid().where(positive, 0)
            push = (score - level).exp().where(negative, 0) * pull.sum(1, keepdim=True)
            d_score = (push - pull) * scale
            d_anchors[here] = d_score @ given.rows
            d_rows += d_score.t() @ given.anchors[here]
        if rows is None:
            return (d_anchors + d_rows).to(anchors.dtype), None, None, None, None
        return d_anchors.to(anchors.dtype), None, d_rows.to(rows.dtype), None, None


class _Given(NamedTuple):
    anchors: Tensor  # [N, D], float32 or wider
    rows: Tensor
    row_labels: Tensor

    @classmethod
    def of(cls, anchors: Tensor, labels: Tensor, rows: Tensor | None, row_labels: Tensor | None) -> _Given:
        wide = anchors.to(checks.wide(anchors))
        if rows is None or row_labels is None:
            return cls(wide, wide, labels)
        return cls(wide, rows.to(wide.dtype), row_labels)


_recorded = dispatched.recorded_once(_PairInfoNCE, "pair_info_nce")


def _blocks(labels: Tensor, row_labels: Tensor, is_self: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(anchors, which rows are positive, which negative [n, R])."""
    size = max(1, _AT_ONCE // max(1, len(row_labels)))
    places = torch.arange(len(row_labels), device=labels.device)
    for start in range(0, len(labels), size):
        here = slice(start, min(start + size, len(labels)))
        same = labels[here, None] == row_labels
        other = ~same
        if is_self:
            same = same & (places[here, None] != places)
        yield here, same, other


def _scores(anchors: Tensor, rows: Tensor, negative: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """s [n, R] and m [n, 1]."""
    score = anchors @ rows.t() / temperature
    return score, score.masked_fill(~negative, -torch.inf).logsumexp(1, keepdim=True)
