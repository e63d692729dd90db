"""Launch settings: which tile sizes, warps and stages a kernel gets, per architecture, dtype, dim, number of classes and layout.

A table is a list of rows, the first row that matches wins. A row matches where every condition it has holds:
    kernel   name of the kernel                      dtype    "fp32" | "half"
    max_dim, max_classes   upper limits              layout   "pixels" (pixels lie side by side, NCHW) | "channels" (channels_last)
    dim, num_classes       exactly these
Image sizes are never part of a key. `tune.py` writes a user's own rows (JSON, `user_table_path()`), which are looked at first.
Nothing here was measured on a GPU yet: the rows are what compiles without spills and fits the arithmetic of the design.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def _row(kernel: str, *, warps: int = 4, stages: int = 3, registers: int | None = 255, dtype: str | None = None, layout: str | None = None,
         max_dim: int | None = None, max_classes: int | None = None, **blocks: int) -> Row:  # fmt: skip
    conditions = {"kernel": kernel, "dtype": dtype, "layout": layout, "max_dim": max_dim, "max_classes": max_classes}
    launch = {"num_warps": warps, "num_stages": stages, "maxnreg": registers, **blocks}
    return {k: v for k, v in conditions.items() if v is not None} | {
        "launch": {k: v for k, v in launch.items() if v is not None}
    }


_small = functools.partial(_row, registers=None)  # the interpreter knows no registers

_FEW = functools.partial(_row, "contrast_prototypes", max_classes=32, BLOCK_K=32, stages=1)
_FEW_CLASSES: list[Row] = [
    _FEW(dtype="fp32", BLOCK_N=32, BLOCK_D=32, BLOCK_O=64, warps=8),
    _FEW(max_dim=256, BLOCK_N=64, BLOCK_D=32, BLOCK_O=256, warps=16, registers=128),
    _FEW(BLOCK_N=64, BLOCK_D=64, BLOCK_O=128, warps=16, registers=128),
]
# One block of 16 warps is all that a multiprocessor holds, its registers then: as many warps as two blocks of 8, of twice the tile.
_MANY_CLASSES = functools.partial(_row, "contrast_prototypes", BLOCK_K=64, stages=1, warps=16, registers=128)

# BLOCK_N pixels, BLOCK_K classes, BLOCK_D channels of a dot, BLOCK_O channels of an output. maxnreg 255 is no limit, but without it ptxas
# aims at an occupancy of its own and takes a few bytes of spills for it.
_DEFAULT: list[Row] = [
    # Forward: D streamed through shared memory, the K logits of a pixel in registers. fp32 dots are FMA: short in D, or operands spill.
    _row("contrast_forward", dtype="fp32", max_classes=32, BLOCK_N=64, BLOCK_K=32, BLOCK_D=16, warps=8, stages=4),
    _row("contrast_forward", dtype="fp32", BLOCK_N=64, BLOCK_K=64, BLOCK_D=16, warps=8),
    _row("contrast_forward", max_classes=16, BLOCK_N=64, BLOCK_K=16, BLOCK_D=128),
    _row("contrast_forward", max_classes=32, BLOCK_N=64, BLOCK_K=32, BLOCK_D=128),
    _row("contrast_forward", BLOCK_N=64, BLOCK_K=64, BLOCK_D=64),
    # Forward with the pixel tile resident: K streamed. BLOCK_D is the power of two that holds D (the launcher sets it).
    _row("contrast_forward_resident", max_dim=256, BLOCK_N=64, BLOCK_K=32, stages=2),
    _row("contrast_forward_resident", BLOCK_N=64, BLOCK_K=32, stages=2, warps=8),
    # Backward, pixel tile resident.
    _row("contrast_backward_resident", max_dim=128, BLOCK_N=64, BLOCK_K=32, stages=2),
    _row("contrast_backward_resident", max_dim=256, BLOCK_N=64, BLOCK_K=32, stages=2, warps=8),
    _row("contrast_backward_resident", BLOCK_N=32, BLOCK_K=32, stages=1, warps=8),
    # Backward, all K in one tile, D in steps.
    _row(
        "contrast_backward_tile", dtype="fp32", max_classes=32, BLOCK_N=32, BLOCK_K=32, BLOCK_D=32, BLOCK_O=32, stages=2
    ),
    _row(
        "contrast_backward_tile", dtype="fp32", max_classes=64, BLOCK_N=32, BLOCK_K=64, BLOCK_D=16, BLOCK_O=32, stages=2
    ),
    _row("contrast_backward_tile", max_classes=32, BLOCK_N=64, BLOCK_K=32, BLOCK_D=64, BLOCK_O=64),
    _row("contrast_backward_tile", max_classes=64, BLOCK_N=64, BLOCK_K=64, BLOCK_D=64, BLOCK_O=64, stages=2),
    # Backward, both K and D in steps: any size.
    # BLOCK_O is cut to the power of two that holds D where that is less. Each block of output channels forms all logits again, and each
    # block of classes reads the features again: large ones, of as many registers as there are, save arithmetic and L2 both.
    # (float32 with 64 classes spills up to 264 bytes on sm_80 where Triton is 3.8)
    _row("contrast_backward_split", dtype="fp32", BLOCK_N=32, BLOCK_K=32, BLOCK_D=16, BLOCK_O=256, stages=1, warps=8),
    _row("contrast_backward_split", BLOCK_N=64, BLOCK_K=64, BLOCK_D=64, BLOCK_O=128, stages=2, warps=8),
    _row(
        "contrast_backward_split_saved",
        dtype="fp32",
        BLOCK_N=64,
        BLOCK_K=16,
        BLOCK_D=16,
        BLOCK_O=128,
        stages=1,
        warps=8,
    ),
    _row("contrast_backward_split_saved", BLOCK_N=64, BLOCK_K=64, BLOCK_D=64, BLOCK_O=128, stages=2, warps=8),
    # With an option that needs more of a pixel in registers (any target but a plain label; variances): less of everything else.
    _row("contrast_forward_target", dtype="fp32", BLOCK_N=64, BLOCK_K=32, BLOCK_D=16, warps=8),
    _row(
        "contrast_forward_teacher", BLOCK_N=64, BLOCK_K=32, BLOCK_D=32, stages=2, warps=8
    ),  # half floats against float32
    _row("contrast_forward_variances", dtype="fp32", BLOCK_N=32, BLOCK_K=32, BLOCK_D=16, stages=2),
    _row("contrast_forward_variances", BLOCK_N=64, BLOCK_K=32, BLOCK_D=64, stages=2),
    _row("contrast_forward_target", BLOCK_N=64, BLOCK_K=32, BLOCK_D=64, stages=2),
    _row("contrast_backward_target", dtype="fp32", BLOCK_N=32, BLOCK_K=32, BLOCK_D=16, BLOCK_O=32, stages=2, warps=8),
    _row("contrast_backward_target", BLOCK_N=32, BLOCK_K=32, BLOCK_D=32, BLOCK_O=64, stages=2, warps=8),
    *_FEW_CLASSES,
    _MANY_CLASSES(dtype="fp32", max_dim=64, BLOCK_N=32, BLOCK_D=16, BLOCK_O=64),
    _MANY_CLASSES(dtype="fp32", BLOCK_N=16, BLOCK_D=16, BLOCK_O=256),
    _MANY_CLASSES(BLOCK_N=64, BLOCK_D=64, BLOCK_O=128),
    _row("contrast_prototypes_target", dtype="fp32", BLOCK_N=32, BLOCK_K=32, BLOCK_D=32, BLOCK_O=64, stages=1, warps=8),
    _row("contrast_prototypes_target", BLOCK_N=64, BLOCK_K=32, BLOCK_D=64, BLOCK_O=128, stages=1, warps=8),
    _row("moments", dtype="fp32", BLOCK_N=32, BLOCK_K=32, BLOCK_O=128, stages=1, warps=8),
    _row("moments", max_classes=32, BLOCK_N=32, BLOCK_K=32, BLOCK_O=256, stages=1, warps=8),
    _row("moments", BLOCK_N=32, BLOCK_K=64, BLOCK_O=256, stages=1, warps=8),
    # All channels of a few pixels, 32 registers of them per thread: two programs share a multiprocessor, one loads while the other adds.
    *(
        _row("unit_moments", max_dim=8192 >> n, BLOCK_N=1 << n, stages=1, warps=8, registers=128)
        for n in range(6, -1, -1)
    ),
    _row("unit_moments", BLOCK_N=1, stages=1, warps=8),
]

TABLES: dict[str, list[Row]] = {
    "default": _DEFAULT,
    "sm_80": _DEFAULT,
    # 99 KB of shared memory a block instead of 163 to 227: the large resident tiles do not fit.
    "sm_89": [
        _row("contrast_forward_resident", max_dim=256, BLOCK_N=64, BLOCK_K=32, stages=1),
        _row("contrast_forward_resident", BLOCK_N=32, BLOCK_K=32, stages=1, warps=8),
        _row("contrast_backward_resident", max_dim=256, BLOCK_N=32, BLOCK_K=32, stages=1, warps=8),
        _row("contrast_backward_resident", BLOCK_N=16, BLOCK_K=32, stages=1, warps=8),
        *_DEFAULT,
    ],
    # One stage more: Hopper has the shared memory, and one pixel tile a program is little in flight.
    "sm_90": [
        _row("contrast_forward", dtype="fp32", max_classes=32, BLOCK_N=64, BLOCK_K=32, BLOCK_D=32, stages=4, warps=8),
        _row("contrast_forward", dtype="half", max_classes=32, BLOCK_N=64, BLOCK_K=32, BLOCK_D=128, stages=4),
        # With many classes the prototypes are most of what is read: of L2, once per tile of pixels, or of pixels once per block of classes.
        _row("contrast_forward_resident", max_classes=64, max_dim=256, BLOCK_N=64, BLOCK_K=32, stages=2),
        _row("contrast_forward_resident", max_dim=64, BLOCK_N=128, BLOCK_K=32, stages=2, warps=8, registers=80),
        _row("contrast_forward_resident", max_dim=256, BLOCK_N=128, BLOCK_K=32, stages=2, warps=8),
        # 16 warps would spill 8 bytes
        _FEW(dtype="half", max_dim=256, BLOCK_N=64, BLOCK_D=32, BLOCK_O=256, warps=8, registers=168),
        *_FEW_CLASSES,
        _MANY_CLASSES(dtype="fp32", BLOCK_N=32, BLOCK_D=16, BLOCK_O=256),
        _MANY_CLASSES(BLOCK_N=64, BLOCK_D=64, BLOCK_O=256),
        _row(
            "contrast_backward_split", dtype="fp32", BLOCK_N=32, BLOCK_K=64, BLOCK_D=16, BLOCK_O=256, stages=1, warps=8
        ),
        *_DEFAULT,
    ],
    "sm_100": _DEFAULT,
    # Small tiles, so that tests on tiny shapes cross every tile edge.
    "interpreter": [
        # the contrast's tiles of one size: numpy rounds a product by it, and the backward must meet the logits of the forward
        *(
            _small(f"contrast_{k}", BLOCK_N=32, BLOCK_K=32, BLOCK_D=16, BLOCK_O=16)
            for k in ("backward_split", "backward_split_saved", "backward_target", "prototypes", "prototypes_target")
        ),
        *(
            _small(f"contrast_{k}", BLOCK_N=32, BLOCK_K=32, BLOCK_D=16)
            for k in ("forward", "forward_target", "forward_teacher", "forward_variances")
        ),
        *(_small(f"contrast_{k}_resident", BLOCK_N=32, BLOCK_K=32) for k in ("forward", "backward")),
        _small("contrast_backward_tile", max_classes=32, BLOCK_N=32, BLOCK_K=32, BLOCK_D=16, BLOCK_O=16),
        _small("unit_moments", BLOCK_N=8),
        _small("moments", BLOCK_N=32, BLOCK_K=32, BLOCK_O=16),
    ],
}


@functools.cache
def architecture(device_index: int) -> str:
    major, minor = torch.cuda.get_device_capability(device_index)
    name = f"sm_{major}{minor}"
    return name if name in TABLES else "default"


def user_table_path() -> Path:
    """Where `tune` writes and where launches look first: SPCL_FAST_LAUNCH_TABLE, or launch.json in the user's cache folder."""
    named = os.environ.get("SPCL_FAST_LAUNCH_TABLE")
    return (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spcl_fast" / "launch.json"
    )


@functools.cache
def _user_rows(arch: str) -> list[Row]:
    """The user's rows for `arch`. A table that cannot be read is refused with its name: silence would hide a typo for ever."""
    path = user_table_path()
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text()).get(arch, [])
        for row in rows:
            launch = row["launch"]
            blocks = [value for name, value in launch.items() if name not in ("num_stages", "maxnreg")]
            if "kernel" not in row or not all(
                isinstance(value, int) and value > 0 and value & (value - 1) == 0 for value in blocks
            ):
                raise ValueError(f"bad row {row}")
        return rows
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"launch table {path}: {error}; expected what `tune` writes; delete it to have the shipped one"
        ) from error


_overrides: list[Row] = []


@functools.lru_cache(maxsize=4096)
def _find(arch: str, kernel: str, dtype: torch.dtype, dim: int, num_classes: int, layout: str) -> dict[str, int] | None:
    kind = "fp32" if dtype == torch.float32 else "half"
    for row in (*_overrides, *_user_rows(arch), *TABLES[arch]):
        if (
            row["kernel"] == kernel
            and row.get("dtype", kind) == kind
            and row.get("layout", layout) == layout
            and dim == row.get("dim", dim)
            and num_classes == row.get("num_classes", num_classes)
            and dim <= row.get("max_dim", dim)
            and num_classes <= row.get("max_classes", num_classes)
        ):
            return dict(row["launch"])
    return None


def find(
    arch: str, kernel: str, dtype: torch.dtype, dim: int, num_classes: int, layout: str = "pixels"
) -> dict[str, int] | None:
    """The launch settings of `kernel` (treat as read-only), or None where the table has no row: that kernel is not for these sizes."""
    return _find(arch, kernel, dtype, dim, num_classes, layout)


def settings_of(
    arch: str, kernel: str, dtype: torch.dtype, dim: int, num_classes: int, layout: str = "pixels"
) -> dict[str, int]:
    """As `find`, of a kernel that every table has for all sizes."""
    settings = _find(arch, kernel, dtype, dim, num_classes, layout)
    if settings is None:
        raise LookupError(
            f"the launch table of {arch} has no row of {kernel} for {dtype}, {dim} channels and {num_classes} classes; "
            f"add one without limits to kernels/launch.py"
        )
    return settings


@contextlib.contextmanager
def override(*rows: Row):
    """Rows that win while the context lasts: for `tune` and for tests."""
    _overrides[:0] = rows
    _find.cache_clear()
    try:
        yield
    finally:
        del _overrides[: len(rows)]
        _find.cache_clear()


def forget() -> None:
    """Read the user's table again at the next launch."""
    _user_rows.cache_clear()
    _find.cache_clear()
