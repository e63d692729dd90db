"""Logits of one image against the rows of prototypes, their pooling into classes, and the way back: the linear part of every loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Contrast, Logits, Wanted
from .exact import fixed_sum, matmul, widened

EPS = 1e-12  # of F.normalize


class WideRows(NamedTuple):
    """What the M rows of one problem are made of, wide."""

    prototypes: Tensor  # [M, D] or [B, M, D]
    variances: Tensor | None
    bias: Tensor | None  # [M] or [B, M]
    temperature: float | Tensor
    normalize: bool
    prototype_class: Tensor | None  # [M]
    pool: str
    num_classes: int

    def image(self, b: int) -> WideRows:
        """Those of image b: prototypes [M, D], bias [M]."""
        prototypes, variances, bias = self.prototypes, self.variances, self.bias
        if prototypes.dim() == 3:
            prototypes, variances = prototypes[b], None if variances is None else variances[b]
        if bias is not None and bias.dim() == 2:
            bias = bias[b]
        return self._replace(prototypes=prototypes, variances=variances, bias=bias)


def rows_of(problem: Contrast | Logits, dtype: torch.dtype) -> WideRows:
    p = problem
    temperature = p.temperature.to(dtype) if isinstance(p.temperature, Tensor) else p.temperature
    return WideRows(
        p.prototypes.to(dtype), widened(p.variances, dtype), widened(p.bias, dtype), temperature, p.normalize,
        p.prototype_class, p.pool, p.num_classes,
    )  # fmt: skip


def inverse_norm(x: Tensor, normalize: bool) -> Tensor:
    """x [D, P] -> [P]."""
    return 1 / x.norm(dim=0).clamp_min(EPS) if normalize else torch.ones_like(x[0])


def row_logits(x: Tensor, inv: Tensor, rows: WideRows, with_variances: bool = True) -> Tensor:
    """x [D, P] -> s [M, P]."""
    logits = matmul(rows.prototypes, x) * (inv / rows.temperature)
    if with_variances and rows.variances is not None:
        logits += matmul(rows.variances, x.square()) * (0.5 * inv.square() / rows.temperature**2)
    if rows.bias is not None:
        logits += rows.bias[:, None]
    return logits


def membership(rows: WideRows) -> Tensor:
    """[K, M]: 1 where the row is the class's."""
    assert rows.prototype_class is not None
    classes = torch.arange(rows.num_classes, device=rows.prototype_class.device)
    return (rows.prototype_class == classes[:, None]).to(rows.prototypes.dtype)


def pooled(s: Tensor, rows: WideRows) -> Tensor:
    """s [M, P] -> z [K, P]; -inf for a class without a row."""
    if rows.prototype_class is None:
        return s
    index = rows.prototype_class[:, None].expand_as(s)
    top = s.new_full((rows.num_classes, s.shape[1]), -torch.inf).scatter_reduce_(0, index, s, "amax")
    if rows.pool == "max":
        return top
    total = matmul(membership(rows), (s - _finite(top)[rows.prototype_class]).exp())
    return torch.where(top.isinf(), top, top + total.log())


def unpooled(dz: Tensor, s: Tensor, z: Tensor, rows: WideRows) -> Tensor:
    """Gradient of the classes [K, P] -> of the rows [M, P]: by the rows' shares, or to the lowest row that is the maximum."""
    if rows.prototype_class is None:
        return dz
    of_row = rows.prototype_class
    if rows.pool == "logsumexp":
        return dz[of_row] * (s - _finite(z)[of_row]).exp()
    number = torch.arange(len(of_row), device=s.device)[:, None]
    candidate = torch.where(s == z[of_row], number, len(of_row))
    first = torch.full_like(z, len(of_row), dtype=torch.int64).scatter_reduce_(
        0, of_row[:, None].expand_as(candidate), candidate, "amin"
    )
    return dz[of_row].where(first[of_row] == number, 0)


def _finite(z: Tensor) -> Tensor:
    return z.where(z.isfinite() | z.isnan(), 0)


class RowGradients(NamedTuple):
    """Of one image."""

    features: Tensor | None  # [D, P]
    prototypes: Tensor | None  # [M, D]
    bias: Tensor | None  # [M]
    temperature: Tensor | None  # []


def row_gradients(
    x: Tensor, inv: Tensor, ds: Tensor, ds_variances: Tensor, counted: Tensor | None, rows: WideRows, wanted: Wanted
) -> RowGradients:
    """x [D, P]; ds [M, P]: the gradient of the rows' logits, ds_variances: of their variance terms; counted [P]: pixels with a label, or
    None where every pixel counts. What stands at other pixels is never read into a sum."""
    keep = (lambda values: values) if counted is None else (lambda values: values.where(counted, 0))
    unit = x * inv
    dprototypes = dbias = dtemperature = dx = None
    if wanted.prototypes:
        dprototypes = matmul(ds, keep(unit).T) / rows.temperature
    if wanted.bias:
        dbias = fixed_sum(ds, 1)
    if wanted.temperature:
        dot = keep(row_logits(x, inv, rows._replace(variances=None, bias=None)))
        dtemperature = -fixed_sum(ds * dot) / rows.temperature
        if rows.variances is not None:
            square = keep(matmul(rows.variances, x.square()) * (inv.square() / rows.temperature**2))
            dtemperature -= fixed_sum(ds_variances * square) / rows.temperature
    if wanted.features:
        dunit = matmul(rows.prototypes.T, ds) / rows.temperature
        if rows.variances is not None:
            dunit += unit * matmul(rows.variances.T, ds_variances) / rows.temperature**2
        if rows.normalize:
            radial = (unit * dunit).sum(0).where(inv < 1 / EPS, 0)  # a clamped norm is a constant
            dunit -= radial * unit
        dx = keep(dunit * inv)
    return RowGradients(dx, dprototypes, dbias, dtemperature)
