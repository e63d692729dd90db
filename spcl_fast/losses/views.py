"""Cross-entropy of many views of the same images against the soft targets of a few: DINO's and SwAV's loss.

    loss = mean over pairs (target q, view v) and images n of  - sum over k of  t_qnk log softmax over k of <x_vn, P_k> / temperature

It is linear in the targets, so a view is compared once, with the sum of the targets that it predicts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import checks, dispatched

_ROWS, SCORES = 64, 1 << 20  # rows at a time: so many, or more while they have fewer scores (4 MB)
_TOGETHER = (
    2  # times as many images whose targets are there: a product of few rows costs what reading the prototypes costs
)
_AT_ONCE, _PROTOTYPES = 1 << 18, 512  # scores, and prototypes, that are read again while they are in the cache
_CLASSES = 64  # whose scores are read together, at least


def views_loss(
    name: str, views: Sequence[Tensor], targets: Sequence[ops.TeacherTargets], predicts: Sequence[Sequence[int]], prototypes: Tensor, *,
    temperature: float, backend: str | None,
) -> Tensor:  # fmt: skip
    """views of [N, D]; targets: of [N, E] each, with rows that sum to 1, the same prototypes and temperature; predicts: for each view the
    places of its targets; prototypes [K, D], used as they are like the views -> []. name: of the loss, for errors."""
    if len({len(rows) for rows in (*views, *(target.features for target in targets))}) > 1:
        raise ValueError(f"{name}: every view must have as many rows")
    if backend is None and is_for_blocks(views[0]):
        return _by_views(name, views, targets, predicts, prototypes, temperature)
    return _by_pairs(views, targets, predicts, prototypes, temperature, backend)


def is_for_blocks(like: Tensor) -> bool:
    """On a GPU the op's kernels multiply half floats on tensor cores and keep no scores, and nobody has measured that blocks are faster
    there. A named backend is the op's, a compiler sees the op as one node, and the op has rules for torch.func."""
    if os.environ.get("SPCL_FAST_BACKEND"):
        return False
    return like.device.type == "cpu" and checks.has_values(like) and not dispatched.is_transformed()


# ---- pair by pair, through the op -------------------------------------------------------------------------------------


def _by_pairs(
    views: Sequence[Tensor], targets: Sequence[ops.TeacherTargets], predicts: Sequence[Sequence[int]], prototypes: Tensor,
    temperature: float, backend: str | None,
) -> Tensor:  # fmt: skip
    """All pairs whose targets have one v in one call: the prototypes, which are most of the memory, are read once and have one gradient."""
    potentials = [target.resolved().u if target.u is None else target.u for target in targets]
    total, count = 0, sum(len(places) for places in predicts)
    for v in {id(target.v): target.v for target in targets}.values():
        pairs = [(q, x) for x, places in zip(views, predicts, strict=True) for q in places if targets[q].v is v]
        if not pairs:
            continue
        together = targets[pairs[0][0]]._replace(
            features=torch.cat([targets[q].features for q, _ in pairs]), u=torch.cat([potentials[q] for q, _ in pairs])
        )
        loss = ops.prototype_contrastive_loss(
            torch.cat([x for _, x in pairs]), together, prototypes, temperature=temperature, normalize=False, backend=backend
        )  # fmt: skip
        total = total + loss * (len(pairs) / count)
    assert isinstance(total, Tensor)  # the callers refuse to have no pair
    return total


# ---- view by view, in blocks of images --------------------------------------------------------------------------------


class _How(NamedTuple):
    temperature: float
    of_targets: float
    groups: tuple[tuple[slice, tuple[int, ...]], ...]  # views that predict the same targets
    wants_views: bool
    wants_prototypes: bool

    @property
    def pairs(self) -> int:
        return sum((at.stop - at.start) * len(places) for at, places in self.groups)


def _by_views(
    name: str, views: Sequence[Tensor], targets: Sequence[ops.TeacherTargets], predicts: Sequence[Sequence[int]], prototypes: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    _check(name, views, targets, prototypes, temperature)
    members: dict[tuple[int, ...], list[Tensor]] = {}
    for x, places in zip(views, predicts, strict=True):
        if places:
            members.setdefault(tuple(places), []).append(x)
    groups, first = [], 0
    for places, own in members.items():
        groups.append((slice(first, first + len(own)), places))
        first += len(own)
    x = torch.stack([x for own in members.values() for x in own])
    wanted = torch.is_grad_enabled()
    how = _How(
        float(temperature), targets[0].temperature, tuple(groups), wanted and x.requires_grad, wanted and prototypes.requires_grad
    )  # fmt: skip
    shifts = [prototypes.new_zeros(len(prototypes)) if target.v is None else target.v.detach() for target in targets]
    f = torch.stack([target.features for target in targets])
    return _views_loss(x, prototypes, f, targets[0].prototypes, torch.stack(shifts), how)[0]


def _check(
    name: str, views: Sequence[Tensor], targets: Sequence[ops.TeacherTargets], prototypes: Tensor, temperature: float
) -> None:
    checks.check_float(name, "prototypes", prototypes, (2,), "[K, D]")
    checks.check_temperature(name, temperature)
    heads = targets[0].prototypes
    checks.check_float(name, "the teacher's prototypes", heads, (2,), "[K, E]")
    checks.check_temperature(name, targets[0].temperature)
    if not len(prototypes) or len(heads) != len(prototypes):
        raise ValueError(
            f"{name}: there must be as many prototypes of the teacher as of the student, at least 1, got {len(heads)} and {len(prototypes)}"
        )
    of_targets = [target.features for target in targets]
    for rows, weight, letter in ((views, prototypes, "D"), (of_targets, heads, "E")):
        for x in rows:
            checks.check_float(name, "a view", x, (2,), f"[N, {letter}]")
            checks.check_device(name, x, "a view", prototypes=weight)
            if x.shape[1] != weight.shape[1]:
                given = f"{list(weight.shape)} for a view {list(x.shape)}"
                raise ValueError(f"{name}: prototypes must be [K, {letter}] with the views' {letter}, got {given}")


class _ViewsLoss:
    """(loss [], and two gradients for an incoming one of 1, [0] where not wanted): nothing of [N, K] is kept, nothing computed twice.
    They are kept in float32: those of float16 would underflow before they are scaled."""

    @staticmethod
    def compute(views: Tensor, prototypes: Tensor, rows: Tensor, heads: Tensor, shifts: Tensor, how: _How):
        kind = checks.wide(views)
        count, images, dim = views.shape
        x, f = views.to(kind) / how.temperature, rows.to(kind) / how.of_targets
        scale, classes = 1 / (how.pairs * max(1, images)), len(prototypes)
        several = min(max(1, images), max(1, max(_ROWS, SCORES // classes) // (count + len(f))))
        of_views, of_targets = (x.new_empty(rows, classes) for rows in (count * several, len(f) * several * _TOGETHER))
        dx = torch.zeros_like(x) if how.wants_views else x.new_empty(0)
        dprototypes = torch.zeros_like(prototypes, dtype=kind) if how.wants_prototypes else x.new_empty(0)
        total = x.new_zeros((), dtype=torch.float64)
        for first in range(0, images, several):
            place = first % (several * _TOGETHER)
            if place == 0:
                together = _softmax_(f[:, first : first + several * _TOGETHER], heads, shifts.to(kind), of_targets)
            targets = together[:, place : place + several]
            own = x[:, first : first + several].flatten(0, 1)
            scores = _products(own, prototypes, of_views).view(count, -1, classes)
            losses, sums = _cross_entropy_(scores, targets, how)
            total += losses.sum(dtype=torch.float64)
            if not (how.wants_views or how.wants_prototypes):
                continue
            drows, scaled = torch.zeros_like(own), own * scale
            for at, slope in _slopes(scores, targets, sums, how):
                if how.wants_views:
                    drows.addmm_(slope, prototypes[at].to(kind))
                if how.wants_prototypes:
                    dprototypes[at].addmm_(slope.t(), scaled)
            if how.wants_views:
                dx[:, first : first + several] = drows.mul_(scale / how.temperature).view(count, -1, dim)
        return (total * scale).to(kind), dx, dprototypes

    @staticmethod
    def keep(ctx, inputs, output):
        *tensors, ctx.how = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # which would be zeros for each gradient
        ctx.formed = output[1:]

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        """Gives the gradients away instead of a copy, which would be as large as the prototypes: a second backward forms them again."""
        views, prototypes, rows, heads, shifts = ctx.saved_tensors
        dx, dprototypes = ctx.formed or _ViewsLoss.compute(views, prototypes, rows, heads, shifts, ctx.how)[1:]
        ctx.formed = None
        return (
            dx.mul_(grad).to(views.dtype) if ctx.needs_input_grad[0] else None,
            dprototypes.mul_(grad).to(prototypes.dtype) if ctx.needs_input_grad[1] else None,
            *[None] * 4,
        )


_views_loss = dispatched.recorded_once(_ViewsLoss, "views_loss")


def _classes(scores: Tensor) -> Iterator[slice]:
    """Of scores [..., K], as many classes as the cache holds with all their rows."""
    classes = scores.shape[-1]
    several = max(_CLASSES, _AT_ONCE * classes // max(1, scores.numel()))
    for first in range(0, classes, several):
        yield slice(first, min(first + several, classes))


def _products(rows: Tensor, prototypes: Tensor, out: Tensor) -> Tensor:
    """rows @ prototypes.t(), into the first rows of `out`; prototypes of another dtype are converted in parts."""
    out = out[: len(rows)]
    for first in range(0, len(prototypes), _PROTOTYPES):
        at = slice(first, first + _PROTOTYPES)
        torch.mm(rows, prototypes[at].to(rows.dtype).t(), out=out[:, at])
    return out


def _softmax_(rows: Tensor, heads: Tensor, shifts: Tensor, out: Tensor) -> Tensor:
    """softmax over k of <rows [Q, n, E], heads_k> + shifts [Q, K] -> [Q, n, K]. The shifts are the v of TeacherTargets; u, which makes the
    rows sum to 1, is not needed."""
    t = _products(rows.flatten(0, 1), heads, out).view(len(rows), -1, len(heads)).add_(shifts[:, None])
    t.sub_(t.amax(2, keepdim=True)).exp_()
    return t.div_(t.sum(2, keepdim=True))


def _sum_of(targets: Tensor, places: tuple[int, ...], at: slice) -> Tensor:
    """[n, classes of `at`]."""
    found = targets[places[0], :, at]
    for place in places[1:]:
        found = found + targets[place, :, at]
    return found


def _cross_entropy_(scores: Tensor, targets: Tensor, how: _How) -> tuple[Tensor, Tensor]:
    """Losses [V, n, 1], not yet divided, and the sums of scores [V, n, K], which become exponentials with a largest one of 1."""
    scores_max = scores.amax(2, keepdim=True)
    losses, sums = torch.zeros_like(scores_max), torch.zeros_like(scores_max)
    for at in _classes(scores):
        part = scores[:, :, at].sub_(scores_max)
        for own, places in how.groups:
            losses[own] -= (part[own] * _sum_of(targets, places, at)).sum(2, keepdim=True)
        sums += part.exp_().sum(2, keepdim=True)
    for own, places in how.groups:
        losses[own] += len(places) * sums[own].log()
    return losses, sums


def _slopes(scores: Tensor, targets: Tensor, sums: Tensor, how: _How) -> Iterator[tuple[slice, Tensor]]:
    """(classes, d loss / d scores [V n, those classes]) of exponentials [V, n, K] and their sums."""
    share = 1 / sums
    for own, places in how.groups:
        share[own] *= len(places)
    for at in _classes(scores):
        part = scores[:, :, at].mul_(share)
        for own, places in how.groups:
            part[own].sub_(_sum_of(targets, places, at))
        yield at, scores.flatten(0, 1)[:, at]
