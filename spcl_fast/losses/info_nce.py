"""Pixel InfoNCE against a memory of labelled rows, which are read block by block.

    s_aj = <anchor_a, row_j> / temperature
    n_a = logsumexp of s_aj over rows of other labels
    loss_a = mean over rows j of the anchor's label of  -log(e^{s_aj} / (e^{s_aj} + e^{n_a})) = softplus(n_a - s_aj)

Each positive meets the negatives alone, not the other positives. No [A, R] map is there, whatever the number of rows.
Source: Wang et al., Exploring Cross-Image Pixel Contrast, arXiv 2101.11939 (equation 3); ReCo, arXiv 2104.04465; U2PL, arXiv 2203.03884.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..estimators.assignment import NONE  # the label of an anchor or a row that takes no part
from ..ops import checks, dispatched

_BLOCK = 1 << 22  # similarities that are there at a time: 16 MB, a few times over


def masked_info_nce(
    anchors: Tensor,  # [A, D]
    labels: Tensor,  # [A], integer
    rows: Tensor | Sequence[Tensor],  # [R, D], or parts of it
    row_labels: Tensor | Sequence[Tensor],  # [R], or parts of it
    *,
    temperature: float,
    excluded: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # [], or [A] for reduction="none"; float32 (float64 for float64 anchors)
    """Mean over the anchors that have a positive (0 where none has) of
    loss_a = mean over rows j of the anchor's label of softplus(n_a - s_aj),  n_a = logsumexp of s_aj over rows of other labels,
    s_aj = <anchor_a, row_j> / temperature.

    anchors [A, D], labels [A]; rows [R, D], row_labels [R] -> [] or, for reduction="none", [A].
    Differentiable once, in anchors and rows. Anchors and rows are used as they are, normalise them first.

    rows, row_labels  label -1: a row that is neither positive nor negative. Parts, several tensors one after the other, spare a copy.
    excluded  [A]: the number of a row that is no positive of this anchor (itself, where the anchors are rows, too); -1: none.
    Raises ValueError or TypeError for what does not fit.
    Memory: O(A + gradients) and blocks of 16 MB. Rows that are sorted by label are compared on the CPU with anchors of those labels alone
    where positives are looked for. The same bits in each run.
    Source: ContrastiveSeg, arXiv 2101.11939, eq. 3.
    """
    parts, of_parts = _parts(anchors, labels, rows, row_labels)
    checks.check_temperature("masked_info_nce", temperature)
    labels = labels.long()
    excluded = labels.new_full(labels.shape, NONE) if excluded is None else excluded.long()
    negatives, _ = _negatives(anchors, labels, of_parts, float(temperature), *parts)
    losses, counts, _ = _positive_mean(anchors, negatives, labels, excluded, of_parts, float(temperature), *parts)
    if reduction == "none":
        return losses
    checks.check_choice("masked_info_nce", "reduction", reduction, ("mean", "none"))
    return losses.sum() / (counts > 0).sum().clamp_min(1)


def prototype_info_nce(
    anchors: Tensor, labels: Tensor, prototypes: Tensor, rows: Tensor | Sequence[Tensor],
    row_labels: Tensor | Sequence[Tensor], *, temperature: float = 0.5,
) -> Tensor:  # fmt: skip
    """The one positive of an anchor is its class's prototype: softplus(n_a - <anchor_a, prototype_label> / temperature). -> [].

    anchors [A, D], labels [A] (-1: left out), prototypes [K, D], rows and row_labels as in `masked_info_nce`; mean over anchors.
    The kind of ReCo and U2PL (temperature 0.5): they draw 512 and 50 of the memory's rows per anchor, here all of them are negatives, so
    nothing is drawn and nothing of [A, 512, D] gathered. Differentiable in anchors, prototypes and rows. Memory: blocks of 16 MB.
    Source: ReCo, arXiv 2104.04465; U2PL, arXiv 2203.03884.
    """
    parts, of_parts = _parts(anchors, labels, rows, row_labels)
    checks.check_temperature("prototype_info_nce", temperature)
    labels = labels.long()
    negatives, _ = _negatives(anchors, labels, of_parts, float(temperature), *parts)
    own = (anchors.to(negatives.dtype) * prototypes.to(negatives.dtype)[labels.clamp_min(0)]).sum(1) / temperature
    losses = torch.where(labels != NONE, F.softplus(negatives - own), 0)
    return losses.sum() / (labels != NONE).sum().clamp_min(1)


def _parts(
    anchors: Tensor, labels: Tensor, rows: Tensor | Sequence[Tensor], row_labels: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    name = "masked_info_nce"
    checks.check_float(name, "anchors", anchors, (2,), "[A, D]")
    checks.check_labels_tensor(name, labels, 1, "[A]")
    parts = [rows] if isinstance(rows, Tensor) else list(rows)
    of_parts = [row_labels] if isinstance(row_labels, Tensor) else list(row_labels)
    if len(labels) != len(anchors):
        raise ValueError(f"{name}: labels must be [A] = [{len(anchors)}], got shape {list(labels.shape)}")
    if len(parts) != len(of_parts):
        raise ValueError(f"{name}: give as many row_labels as rows, got {len(of_parts)} and {len(parts)} parts")
    for part, own in zip(parts, of_parts, strict=True):
        if part.dim() != 2 or part.shape[1] != anchors.shape[1] or own.shape != part.shape[:1]:
            raise ValueError(
                f"{name}: rows must be [R, {anchors.shape[1]}] and row_labels [R], got {list(part.shape)} and {list(own.shape)}"
            )
        checks.check_device(name, anchors, "anchors", rows=part, row_labels=own)
    return parts, tuple(own.long() for own in of_parts)


class _Block:
    """Similarities of all anchors, or of some, to a few rows."""

    def __init__(
        self, anchors: Tensor, temperature: float, part: int, at: slice, rows: Tensor, labels: Tensor, first: int
    ) -> None:
        self.part, self.at, self.rows, self.labels, self.first = part, at, rows, labels, first
        self.scores = anchors @ rows.t() / temperature

    def negative(self, labels: Tensor) -> Tensor:
        return (labels[:, None] != self.labels) & (self.labels != NONE)

    def positive(self, labels: Tensor, excluded: Tensor) -> Tensor:
        numbers = torch.arange(self.first, self.first + len(self.rows), device=labels.device)
        return (labels[:, None] == self.labels) & (labels[:, None] != NONE) & (numbers != excluded[:, None])


def _spans(
    parts: Sequence[Tensor], of_parts: Sequence[Tensor], anchors: int
) -> Iterator[tuple[int, slice, Tensor, int]]:
    """(part, rows of it, their labels, number of the first row)."""
    size, first = max(1, _BLOCK // max(1, anchors)), 0
    for part, (rows, labels) in enumerate(zip(parts, of_parts, strict=True)):
        for start in range(0, len(rows), size):
            at = slice(start, min(start + size, len(rows)))
            yield part, at, labels[at], first + start
        first += len(rows)


def _blocks(
    anchors: Tensor, temperature: float, parts: Sequence[Tensor], of_parts: Sequence[Tensor]
) -> Iterator[_Block]:
    for part, at, labels, first in _spans(parts, of_parts, len(anchors)):
        yield _Block(anchors, temperature, part, at, parts[part][at].to(anchors.dtype), labels, first)


def _blocks_with_positives(
    anchors: Tensor, labels: Tensor, temperature: float, parts: Sequence[Tensor], of_parts: Sequence[Tensor]
) -> Iterator[tuple[Tensor | slice, _Block]]:
    """(anchors that may have a positive in it, block): on the CPU those whose labels are there; on a GPU, without a sync, all."""
    for part, at, own, first in _spans(parts, of_parts, len(anchors)):
        chosen: Tensor | slice = slice(None)
        has_values = type(anchors) is Tensor and not torch.compiler.is_compiling()  # unlike a fake or traced tensor
        if anchors.device.type == "cpu" and has_values:
            chosen = torch.isin(labels, own.unique()).nonzero()[:, 0]
            if not len(chosen):
                continue
        yield chosen, _Block(anchors[chosen], temperature, part, at, parts[part][at].to(anchors.dtype), own, first)


def _wide(anchors: Tensor) -> Tensor:
    return anchors.to(checks.wide(anchors))


class _NegativeLogsumexp:
    """(n [A], -inf where there is no negative; n as its backward reads it)."""

    @staticmethod
    def compute(
        anchors: Tensor, labels: Tensor, of_parts: tuple[Tensor, ...], temperature: float, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(anchors)
        largest = wide.new_full((len(wide),), -torch.inf)
        total = torch.zeros_like(largest)
        for block in _blocks(wide, temperature, parts, of_parts):
            scores = block.scores.masked_fill_(~block.negative(labels), -torch.inf)
            now = torch.maximum(largest, scores.amax(1))
            base = now.masked_fill(now == -torch.inf, 0)
            total = total * (largest - base).exp() + scores.sub_(base[:, None]).exp_().sum(1)
            largest = now
        found = largest + total.log()
        return found.where(total > 0, -torch.inf), found

    @staticmethod
    def keep(ctx, inputs, output):
        anchors, labels, ctx.of_parts, ctx.temperature, *parts = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(anchors, labels, output[1], *parts)

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        anchors, labels, found, *parts = ctx.saved_tensors
        wide = _wide(anchors)
        grad = grad.masked_fill(found == -torch.inf, 0) / ctx.temperature
        gradients = _Gradients(wide, parts, ctx.needs_input_grad[4:])
        base = found.masked_fill(~found.isfinite(), 0)
        for block in _blocks(wide, ctx.temperature, parts, ctx.of_parts):
            share = block.scores.sub_(base[:, None]).exp_().mul_(grad[:, None])
            gradients.add(slice(None), block, share.masked_fill_(~block.negative(labels), 0))
        return gradients.anchors.to(anchors.dtype), None, None, None, *gradients.of_parts


class _PositiveMean:
    """(mean over positives of softplus(n - s) [A], number of positives [A], slope of the mean in n [A])."""

    @staticmethod
    def compute(
        anchors: Tensor, negatives: Tensor, labels: Tensor, excluded: Tensor, of_parts: tuple[Tensor, ...], temperature: float,
        *parts: Tensor,
    ):  # fmt: skip
        wide = _wide(anchors)
        total, slope = torch.zeros_like(negatives), torch.zeros_like(negatives)
        counts = torch.zeros_like(labels)
        for chosen, block in _blocks_with_positives(wide, labels, temperature, parts, of_parts):
            positive = block.positive(labels[chosen], excluded[chosen])
            gap = block.scores.neg_().add_(negatives[chosen][:, None])
            total[chosen] += F.softplus(gap).masked_fill_(~positive, 0).sum(1)
            slope[chosen] += gap.sigmoid_().masked_fill_(~positive, 0).sum(1)
            counts[chosen] += positive.sum(1)
        number = counts.clamp_min(1)
        return total / number, counts, slope / number

    @staticmethod
    def keep(ctx, inputs, output):
        anchors, negatives, labels, excluded, ctx.of_parts, ctx.temperature, *parts = inputs
        _, counts, slope = output
        ctx.mark_non_differentiable(counts, slope)
        ctx.save_for_backward(anchors, negatives, labels, excluded, counts, slope, *parts)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        anchors, negatives, labels, excluded, counts, slope, *parts = ctx.saved_tensors
        wide = _wide(anchors)
        each = -grad / counts.clamp_min(1) / ctx.temperature
        gradients = _Gradients(wide, parts, ctx.needs_input_grad[6:])
        for chosen, block in _blocks_with_positives(wide, labels, ctx.temperature, parts, ctx.of_parts):
            positive = block.positive(labels[chosen], excluded[chosen])
            share = block.scores.neg_().add_(negatives[chosen][:, None]).sigmoid_().mul_(each[chosen][:, None])
            gradients.add(chosen, block, share.masked_fill_(~positive, 0))
        return gradients.anchors.to(anchors.dtype), grad * slope, None, None, None, None, *gradients.of_parts


class _Gradients:
    def __init__(self, anchors: Tensor, parts: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        self.values = anchors
        self.anchors = torch.zeros_like(anchors)
        self.of_parts = [
            torch.zeros_like(part) if is_wanted else None for part, is_wanted in zip(parts, wanted, strict=True)
        ]

    def add(self, chosen: Tensor | slice, block: _Block, share: Tensor) -> None:
        """share: the gradient of the block's dot products."""
        self.anchors[chosen] += share @ block.rows
        of_part = self.of_parts[block.part]
        if of_part is not None:
            of_part[block.at] += (share.t() @ self.values[chosen]).to(of_part.dtype)


_negatives = dispatched.recorded_once(_NegativeLogsumexp, "masked_info_nce")
_positive_mean = dispatched.recorded_once(_PositiveMean, "masked_info_nce")
