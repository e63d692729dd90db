"""balance_: the two half-steps of Sinkhorn in the log domain, s_nk = <f_n, Q_k> / tau with K streamed: nothing of [N, K] reaches memory.

    rows     u_n <- logsumexp_k (s_nk + v_k)         columns  v_k <- logsumexp_n (s_nk + u_n)

One kernel for both: the columns are the rows of the transposed problem. Floor: both matrices read once, 2 N K E operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .operands import Map, Prototypes, Size
from .pixels import architecture, on_device_of, precision, tile_of
from .prototype_contrastive_loss.logits import dots, inverse_temperature, logits_of
from .prototype_contrastive_loss.problem import wide


@triton.jit
def row_logsumexp_kernel(
    features, prototypes, out_ptr, size, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out [P], float32 or float64 = logsumexp over the prototypes; the potential is their bias."""
    b, n, mask_n = tile_of(size, BLOCK_N)
    offs_n = n.to(tl.int64) * features.stride_w
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float64)
    scale = tl.full([BLOCK_N], 1.0, tl.float32) * inverse_temperature(prototypes)
    for k0 in range(0, size.K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        acc, quadratic, _ = dots(
            features.ptr, features.stride_d, prototypes, b, offs_n, mask_n, k0, size.K, size.D,
            BLOCK_N, BLOCK_K, BLOCK_D, False, PRECISION,
        )  # fmt: skip
        z, _, _ = logits_of(acc, quadratic, scale, b, offs_k, prototypes, size.K)
        z = tl.where((offs_k < size.K)[None, :], z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), 1).to(tl.float64)
        top = new_top
    log_total = tl.where(top == -float("inf"), 0.0, tl.log(total.to(tl.float32)))
    if out_ptr.dtype.element_ty == tl.float64:
        tl.store(out_ptr + n, top.to(tl.float64) + log_total.to(tl.float64), mask=mask_n)
    else:
        tl.store(out_ptr + n, top + log_total, mask=mask_n)


def balance_rows(problem, v: Tensor) -> Tensor:
    """-> [N] in v's dtype: logsumexp over k of s_nk + v_k. problem: as the backends' `Balance`."""
    return _logsumexp(problem.features, problem.prototypes, problem.temperature, v)


def balance_columns(problem, u: Tensor) -> Tensor:
    """-> [K] in u's dtype: logsumexp over n of s_nk + u_n."""
    return _logsumexp(problem.prototypes, problem.features, problem.temperature, u)


def _logsumexp(rows: Tensor, columns: Tensor, temperature: float, potential: Tensor) -> Tensor:
    """[count, E], [others, E], [others] -> [count]. Half floats and float32 meet in float32: nothing is rounded to halves."""
    rows, columns = (tensor.float() if tensor.dtype == torch.float64 else tensor for tensor in (rows, columns))
    count, dim = rows.shape
    out = torch.full((count,), -torch.inf, dtype=potential.dtype, device=rows.device)
    if rows.numel() == 0 or columns.numel() == 0:
        return out
    prototypes = Prototypes(
        columns.contiguous(), None, 1 / temperature, None, potential.float().contiguous(), None, None, None, wide(rows, columns)
    )  # fmt: skip
    dtype = torch.float32 if prototypes.wide else rows.dtype  # of the products
    settings = launch.settings_of(architecture(rows), "contrast_forward", dtype, dim, len(columns), "channels")
    with on_device_of(rows):
        row_logsumexp_kernel[(triton.cdiv(count, settings["BLOCK_N"]),)](
            Map(rows, 0, rows.stride(1), None, rows.stride(0)), prototypes, out, Size(count, 1, dim, len(columns)),
            precision(rows.dtype), **settings,
        )  # fmt: skip
    return out
