"""balance_: Sinkhorn's assignment in the log domain, with the prototypes streamed: [N, K] is never there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Ask, Balance
from . import checks, dispatched

_OP = "balance_"
_WHERE_IT_CAN = "where_it_can"  # in a line: the backend is a wish. Asked inside of the op, where no tracer looks


def balance_(
    features: Tensor,  # [N, E]
    prototypes: Tensor,  # [K, E]
    *,
    temperature: float,
    iterations: int = 3,
    class_share: Tensor | None = None,  # [K]
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # u [N], v [K], float32
    """Potentials of the assignment  t_nk = exp(<f_n, prototype_k> / temperature + u_n + v_k)  whose rows sum to 1 and columns to N/K,
    or to N class_share_k where `class_share`, which sums to 1, is given (a class with a share of 0 gets nothing).

    Each iteration balances the columns, then the rows, so the rows are exact and the columns nearly so; 3 iterations are those of SwAV and
    DINOv2. With torch.distributed initialised the columns are those of all ranks (one all-gather of K floats an iteration), and N is the
    number of all rows. Logarithms throughout: float16 features neither overflow nor lose small scores. Not differentiable. No host sync.
    No rows at all: u is empty and v is 0.
    Raises ValueError or TypeError for what does not fit. Memory: O(N + K); neither [N, K] scores nor assignment.
    Source: Caron et al., arXiv 2006.09882, `distributed_sinkhorn` of the released code; Cuturi, NeurIPS 2013.
    """
    _check(features, prototypes)
    checks.check_temperature(_OP, temperature)
    checks.check_options(_OP, ignore_index=0, backend=backend)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"{_OP}: iterations must be an int of at least 1, got {iterations!r}")
    features, prototypes, line = (
        features.detach(),
        prototypes.detach(),
        dispatched.line(f"@{backend}" if backend else ""),
    )
    u = features.new_zeros(len(features), dtype=_wide(features))
    share = _log_share(len(features), len(prototypes), u)
    if class_share is not None:
        checks.check_constant(_OP, "class_share", class_share, ((len(prototypes),),), "one share per prototype")
        checks.check_device(_OP, features, "features", class_share=class_share)
        share = share + (class_share.to(share.dtype) * len(prototypes)).log()
    for _ in range(iterations):
        columns = _over_ranks(_columns(features, prototypes, u, float(temperature), line))
        v = torch.where(columns == -torch.inf, 0, share - columns)  # of no rows at all: 0, not inf
        u = -_rows(features, prototypes, v, float(temperature), line)
    return u, v


def row_potentials(
    features: Tensor, prototypes: Tensor, temperature: float, v: Tensor, backend: str | None = None
) -> Tensor:
    """u [N] in float64 with which the rows sum to 1; `backend` where it can."""
    line = dispatched.line(f"@{backend}" if backend in backends.NAMES else "", _WHERE_IT_CAN)
    return -_rows(features.detach(), prototypes.detach(), v.double(), float(temperature), line)


def _check(features: Tensor, prototypes: Tensor) -> None:
    checks.check_float(_OP, "features", features, (2,), "[N, E]")
    checks.check_float(_OP, "prototypes", prototypes, (2,), "[K, E]")
    if prototypes.shape[1] != features.shape[1] or not prototypes.shape[0] or not features.shape[1]:
        raise ValueError(
            f"{_OP}: prototypes must be [K, E] with the features' E, both at least 1, got {list(prototypes.shape)} for features "
            f"{list(features.shape)}"
        )
    checks.check_device(_OP, features, "features", prototypes=prototypes)


def _wide(features: Tensor) -> torch.dtype:
    return checks.wide(features)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _log_share(rows: int, classes: int, like: Tensor) -> Tensor:
    """log(N/K), N over all ranks."""
    if not _is_distributed():
        return like.new_full((), math.log(max(rows, 1) / classes))
    total = like.new_full((), rows, dtype=torch.int64)
    torch.distributed.all_reduce(total)
    return (total.clamp_min(1) / classes).log().to(like.dtype)


def _over_ranks(columns: Tensor) -> Tensor:
    """logsumexp over the ranks' parts, in the ranks' order: the same bits everywhere."""
    if not _is_distributed():
        return columns
    parts = [torch.empty_like(columns) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, columns)
    return torch.stack(parts).logsumexp(0)


def _ask(features: Tensor, prototypes: Tensor) -> Ask:
    return Ask(_OP, features.device, features.dtype, prototypes.shape[0], prototypes.shape[1])


def _problem(features: Tensor, prototypes: Tensor, temperature: float, line: str):
    ask, backend = _ask(features, prototypes), dispatched.named_backend(line)
    if backend and _WHERE_IT_CAN in dispatched.words(line) and backends.why_not(backend, ask) is not None:
        backend = ""
    return backends.choose(ask, backend), Balance(features, prototypes, temperature)


@torch.library.custom_op("spcl_fast::balance_rows", mutates_args=())
def _rows(features: Tensor, prototypes: Tensor, v: Tensor, temperature: float, line: str) -> Tensor:
    used, problem = _problem(features, prototypes, temperature, line)
    return used.balance_rows(problem, v).to(v.dtype)


@_rows.register_fake
def _(features, prototypes, v, temperature, line):
    return v.new_empty(features.shape[0])


@torch.library.custom_op("spcl_fast::balance_columns", mutates_args=())
def _columns(features: Tensor, prototypes: Tensor, u: Tensor, temperature: float, line: str) -> Tensor:
    used, problem = _problem(features, prototypes, temperature, line)
    return used.balance_columns(problem, u)


@_columns.register_fake
def _(features, prototypes, u, temperature, line):
    return u.new_empty(prototypes.shape[0])
