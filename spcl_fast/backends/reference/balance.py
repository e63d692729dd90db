"""The two half-steps of Sinkhorn, a block of rows at a time: [N, K] is never there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import Balance
from .exact import exact, matmul

_BLOCK_ELEMENTS = 1 << 20


def _blocks(problem: Balance) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their scores [rows, K] in float32 (float64 for float64 features)."""
    features, prototypes, temperature = problem
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    prototypes = prototypes.to(dtype).T
    rows = max(1, _BLOCK_ELEMENTS // max(1, prototypes.shape[1]))
    for start in range(0, len(features), rows):
        part = slice(start, start + rows)
        yield part, matmul(features[part].to(dtype), prototypes) / temperature


@exact
def balance_rows(problem: Balance, v: Tensor) -> Tensor:
    out = v.new_empty(len(problem.features))
    for part, scores in _blocks(problem):
        out[part] = (scores + v.to(scores.dtype)).to(v.dtype).logsumexp(1)
    return out


@exact
def balance_columns(problem: Balance, u: Tensor) -> Tensor:
    out = u.new_full((len(problem.prototypes),), -torch.inf)
    for part, scores in _blocks(problem):
        out = torch.logaddexp(out, (scores + u[part, None]).logsumexp(0))
    return out
