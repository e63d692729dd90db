"""Which backend was measured to be the faster one, by GPU architecture, op, kind of float and size class.

The table, measured.json next to this file, is shipped; `python -m benchmarks.gpu.choice` makes it from a result of `make gpu`:
    {"sm_90": {"gpu": ..., "date": ..., "rows": [{"op": ..., "kind": "fp32" | "half", "size": ..., "order": ["cuda", "triton"], ...}]}}
What is not in it was not measured, and the order of preference in `backends` holds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from pathlib import Path

import torch

from .contract import Ask

PATH = Path(__file__).with_name("measured.json")
KINDS = {torch.float32: "fp32", torch.bfloat16: "half", torch.float16: "half"}
# A problem of fewer values (pixels times channels; times classes where logits are up-sampled) is over before the next launch.
SMALL_VALUES = 1 << 22
_Key = tuple[str, str, str]  # op, kind, size class


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one architecture's part of the table says."""

    gpu: str
    date: str
    orders: dict[_Key, tuple[str, ...]]  # backends from the fastest on


def is_small(values: int) -> bool:
    """Whether launching takes longer than computing. A size that is symbolic while a graph is traced is not small: there is no guard, so
    that nothing is compiled again or refused by torch.export because of the choice of a backend."""
    if torch.compiler.is_compiling() or not isinstance(values, int):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # brings sympy: half a second

        return statically_known_true(values < SMALL_VALUES)
    return values < SMALL_VALUES


def size_class(*, num_classes: int, dim: int, small: bool) -> str:
    """small: launches are the cost. Else by what the kernels do: hundreds of classes stream the prototypes, many do not fit one tile of
    logits, deep features do not stay on chip. The shapes of `make gpu` fall into all of them."""
    if small:
        return "small"
    if num_classes > 32:
        return "hundreds of classes" if num_classes > 256 else "many classes"
    return "deep" if dim > 512 else "large"


@functools.cache
def architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def order(ask: Ask) -> tuple[str, ...]:
    """The measured backends from the fastest on; empty where nothing was measured on such a GPU, op, float and size."""
    here = table().get(architecture(ask.device))
    if here is None:  # and no size is compared: nothing is guarded for a choice that does not depend on it
        return ()
    size = size_class(num_classes=ask.num_classes, dim=ask.dim, small=ask.small)
    return here.orders.get((ask.op, KINDS.get(ask.dtype, ""), size), ())


@functools.cache
def table() -> dict[str, Measured]:
    """The table, read once per process. One that cannot be read gives a warning and does not stop training."""
    found, trouble = read_table(PATH)
    if trouble:
        warnings.warn(f"{trouble}. The order of preference is taken instead.", RuntimeWarning, stacklevel=2)
    return found


def read_table(path: Path) -> tuple[dict[str, Measured], str | None]:
    """The table by architecture, empty where there is none; and what is wrong with the file and what to do, or None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {arch: _entry(part) for arch, part in content.items()}, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, (
            f"the table of measured backends {path} cannot be read ({type(error).__name__}: {error}); delete it, or make it again with "
            "`make gpu` or `python -m benchmarks.gpu.choice RESULT.json`"
        )


def _entry(part: dict) -> Measured:
    orders: dict[_Key, tuple[str, ...]] = {}
    for row in part["rows"]:
        if not isinstance(row["order"], list):
            raise ValueError(f"bad row {row}")
        orders[row["op"], row["kind"], row["size"]] = tuple(row["order"])
    return Measured(part["gpu"], part["date"], orders)


def origin(op: str, device: torch.device, preferred: str) -> str:
    """Where the choice of a backend for `op` on this GPU comes from; `preferred` is taken where nothing was measured."""
    found, trouble = read_table(PATH)
    if trouble:
        return f"{trouble}; {preferred} first"
    arch = architecture(device)
    here = found.get(arch)
    first: dict[str, list[str]] = {}
    for (row_op, kind, size), backends in here.orders.items() if here else ():
        if row_op == op and backends:
            first.setdefault(backends[0], []).append(f"{kind} {size}")
    if here is None or not first:
        return f"not measured on this GPU ({arch}): {preferred} first"
    chosen = "; ".join(f"{backend} for {', '.join(sizes)}" for backend, sizes in sorted(first.items()))
    return f"measured on {arch} ({here.gpu}, {here.date}): {chosen}; {preferred} first elsewhere"
