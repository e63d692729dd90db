"""CAPI (Darcet et al., arXiv 2502.08769): clusters of a teacher's patches, balanced position by position, predicted from masked images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..estimators.moving import is_distributed
from ..ops import dispatched

_BLOCK = 1 << 20  # scores that are there at a time: 4 MB


class CAPIClustering(nn.Module):
    """The teacher's clustering head: forward(x [positions, batch, E]) -> (TeacherTargets of [positions * batch] rows, its own loss).

        s = <x/|x|, weight_k> + bias_k;  t = Sinkhorn of s / target_temperature, over the batch at each position (or over all rows)
        loss = mean over rows of  - sum over k of t_nk log softmax over k of s / prediction_temperature

    The student's loss is `capi_loss` against these targets. Defaults: target_temperature 0.06, prediction_temperature 0.12, 3 iterations.
    bias drops out of the balance, which its first step removes.
    Memory: O(N (E + positions) + positions K) and blocks of 4 MB; the [N, K] assignments, which the authors store, are never there.
    Source: arXiv 2502.08769, `OnlineClustering` in model.py of facebookresearch/capi.
    Different: rows of length below 1e-7 are normalised to length 1.
    """

    def __init__(
        self,
        dim: int,
        num_prototypes: int,
        *,
        bias: bool = True,
        target_temperature: float = 0.06,
        prediction_temperature: float = 0.12,
        iterations: int = 3,
        positionwise: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_prototypes < 1:
            raise ValueError(
                f"CAPIClustering: dim and num_prototypes must be at least 1, got {dim} and {num_prototypes}"
            )
        self.layer = nn.Linear(dim, num_prototypes, bias=bias)
        nn.init.normal_(self.layer.weight, std=1)
        if bias:
            nn.init.zeros_(self.layer.bias)
        self.target_temperature, self.prediction_temperature = target_temperature, prediction_temperature
        self.iterations, self.positionwise, self.backend = iterations, positionwise, backend

    def forward(self, x: Tensor) -> tuple[ops.TeacherTargets, Tensor]:
        if x.dim() != 3 or x.shape[2] != self.layer.in_features:
            raise ValueError(
                f"CAPIClustering: x must be [positions, batch, {self.layer.in_features}], got shape {list(x.shape)}"
            )
        weight, bias = self.layer.weight, self.layer.bias
        if self.positionwise and not is_distributed():
            temperatures = self.target_temperature, self.prediction_temperature
            wants_features = dispatched.is_transformed() or (torch.is_grad_enabled() and x.requires_grad)
            loss, u, v, *_ = _positions_loss(x, weight, bias, temperatures, self.iterations, wants_features)
            rows = F.normalize(x.detach(), dim=-1)
            return _with_own_potentials(rows, weight.detach(), self.target_temperature, u, v), loss
        targets = self.targets(x)
        loss = capi_loss(
            x.flatten(0, 1), targets, weight, bias, temperature=self.prediction_temperature, backend=self.backend
        )
        return targets, loss

    @torch.no_grad()
    @dispatched.ignores_autocast
    def targets(self, x: Tensor) -> ops.TeacherTargets:
        rows, weight = F.normalize(x.detach(), dim=-1), self.layer.weight.detach()
        settings = {"temperature": self.target_temperature, "iterations": self.iterations, "backend": self.backend}
        if not self.positionwise:
            flat = rows.flatten(0, 1)
            u, v = ops.balance_(flat, weight, **settings)
            return ops.TeacherTargets(flat, weight, self.target_temperature, u, v)
        if not is_distributed():
            blocks = _blocks(rows, weight)
            found = [balanced_block(block / self.target_temperature, self.iterations)[1:] for _, block in blocks]
            u, v = torch.cat([u for u, _ in found]).flatten(), torch.cat([v for _, v in found])[:, 0]
            return _with_own_potentials(rows, weight, self.target_temperature, u, v)
        found = [ops.balance_(at_position, weight, **settings) for at_position in rows]  # over the images of all ranks
        u, v = torch.cat([u for u, _ in found]), torch.stack([v for _, v in found])
        return _with_own_potentials(rows, weight, self.target_temperature, u, v)


def capi_loss(
    features: Tensor, targets: ops.TeacherTargets, prototypes: Tensor, bias: Tensor | None = None, *, temperature: float = 0.12,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """mean over rows of - sum over k of t_nk log softmax over k of (<x/|x|, prototype_k> + bias_k) / temperature. features [N, D] -> [].

    prototypes [K, D], bias [K]; targets: those of `CAPIClustering`. Source: CAPI, arXiv 2502.08769.
    """
    return ops.prototype_contrastive_loss(
        features, targets, prototypes, temperature=temperature, bias=None if bias is None else bias / temperature,
        backend=backend,
    )  # fmt: skip


def _blocks(rows: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(positions, similarities [p, batch, K]) of a few positions at a time."""
    positions, batch, _ = rows.shape
    kind = torch.float64 if rows.dtype == torch.float64 else torch.float32
    several = max(1, _BLOCK // (batch * len(weight)))
    for first in range(0, positions, several):
        at = slice(first, min(first + several, positions))
        yield at, rows[at].to(kind) @ weight.to(kind).t()


def balanced_block(scores: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """scores [p, batch, K], which are overwritten -> t [p, batch, K], u [p, batch, 1], v [p, 1, K]: what balance_ does at each position.

    One exponential per score instead of two per iteration. First the columns, then the rows are shifted to a largest score of 0, so every
    row and every column of e^scores has a 1 and nothing above it: no sum overflows or is 0, and what underflows is below 1e-38 of both.
    """
    share = scores.shape[1] / scores.shape[2]
    above = scores.amax(1, keepdim=True)
    beside = scores.sub_(above).amax(2, keepdim=True)
    kernel = scores.sub_(beside).exp_()
    row = beside.exp()  # u = 0 at first
    for _ in range(iterations):
        column = share / (row.mT @ kernel)
        row = 1 / (kernel @ column.mT)
    return kernel.mul_(row).mul_(column), row.log() - beside, column.log() - above


class _PositionsLoss:
    """(loss [], u [positions * batch], v [positions, K], and three gradients): assignments and their loss from one product per position,
    with the gradients for an incoming one of 1; so nothing of [N, K] is kept and nothing is computed twice. The gradient of float16
    features is kept in float32: it would underflow before it is scaled."""

    @staticmethod
    def compute(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperatures: tuple[float, float],
        iterations: int,
        wants_features: bool,
    ):
        target, prediction = temperatures
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=kind).clamp_min(1e-12)
        rows = x / norm
        kept = kind if x.dtype == torch.float16 else x.dtype
        dx = torch.zeros_like(x if wants_features else x[:0], dtype=kept)
        dweight, dbias = torch.zeros_like(weight, dtype=kind), weight.new_zeros(len(weight), dtype=kind)
        total, found, scale = dweight.new_zeros(()), [], 1 / (prediction * x.shape[0] * x.shape[1])
        for at, similarities in _blocks(rows, weight):
            targets, u, v = balanced_block(similarities / target, iterations)
            logits = (similarities if bias is None else similarities.add_(bias)).div_(prediction)
            logits.sub_(logits.amax(2, keepdim=True))
            of_rows = targets.sum(2, keepdim=True)
            total -= (targets * logits).sum()
            share = logits.exp_()
            sums = share.sum(2, keepdim=True)
            total += (of_rows * sums.log()).sum()
            slope = share.mul_(of_rows / sums).sub_(targets)
            own = rows[at].to(kind)
            dweight.addmm_(slope.flatten(0, 1).t(), own.flatten(0, 1))
            dbias += slope.sum((0, 1))
            if wants_features:
                drow = (slope @ weight.to(kind)) * scale
                dx[at] = ((drow - own * (drow * own).sum(2, keepdim=True)) / norm[at]).to(kept)
            found.append((u, v))
        u, v = torch.cat([u for u, _ in found]).flatten(), torch.cat([v for _, v in found])[:, 0]
        return total / (x.shape[0] * x.shape[1]), u, v, dx, dweight.mul_(scale), dbias.mul_(scale)

    @staticmethod
    def keep(ctx, inputs, output):
        ctx.dtypes, ctx.has_bias = (inputs[0].dtype, inputs[1].dtype), inputs[2] is not None
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # which would be zeros for each of them
        ctx.save_for_backward(*output[3:])

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        dx, dweight, dbias = (gradient * grad for gradient in ctx.saved_tensors)
        of_features, of_weight = ctx.dtypes
        return (
            dx.to(of_features) if ctx.needs_input_grad[0] else None,
            dweight.to(of_weight),
            dbias.to(of_weight) if ctx.has_bias else None,
            None,
            None,
            None,
        )


_positions_loss = dispatched.recorded_once(_PositionsLoss, "CAPIClustering")


def _with_own_potentials(rows: Tensor, weight: Tensor, temperature: float, u: Tensor, v: Tensor) -> ops.TeacherTargets:
    """Targets whose v [positions, K] differs from position to position: v is the product of a one-hot position and further channels."""
    positions, batch, _ = rows.shape
    at = torch.eye(positions, device=rows.device, dtype=v.dtype).repeat_interleave(batch, 0)
    wide = torch.cat([rows.flatten(0, 1).to(v.dtype), at], 1)
    return ops.TeacherTargets(wide, torch.cat([weight.to(v.dtype), temperature * v.t()], 1), temperature, u)
