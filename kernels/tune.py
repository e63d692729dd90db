"""Find launch settings on this GPU and write them into the user's table: `spcl-fast tune --dim 256 --classes 19`.

One setting after the other is doubled, halved or stepped as long as that is faster (a few dozen compilations, some minutes). A candidate
whose results differ from the shipped settings' by more than rounding, or that does not fit the GPU, is dropped. The table
(`launch.user_table_path()`) is looked at before the shipped one, from the next process on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import class_moments as moments
from . import launch, pixels
from .prototype_contrastive_loss import contrast
from .prototype_contrastive_loss.problem import holds_tile, saves_logits

_LEAST_BLOCK, _MOST_BLOCK = 16, 256
_REGISTERS = 65536  # of a multiprocessor: what a block may have


class Asked(NamedTuple):
    features: bool = False
    prototypes: bool = False
    bias: bool = False
    temperature: bool = False


def _problem(shape, num_classes: int, dtype: torch.dtype, layout: str, device: torch.device) -> SimpleNamespace:
    """With the fields of the backends' `Contrast` and `Moments`."""
    batch, dim, height, width = shape
    features = torch.randn(shape, device=device).to(dtype)
    if layout == "channels":
        features = features.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, num_classes, (batch, -(-height // 8), -(-width // 8)), device=device)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].contiguous()
    prototypes = F.normalize(torch.randn(num_classes, dim, device=device), dim=1).to(dtype)
    return SimpleNamespace(
        features=features, labels=labels, prototypes=prototypes, num_classes=num_classes, class_weight=None, pixel_weight=None,
        variances=None, temperature=0.1, normalize=True, ignore_index=255, reduction="mean", bias=None, label_smoothing=0.0,
        prototype_class=None, margin=0.0, positive_variance=True, denominator=None, loss="softmax", squares=False,
    )  # fmt: skip


def _calls(problem: SimpleNamespace) -> dict[str, Callable]:
    """What is timed for each group of kernels: name prefix -> call that returns tensors."""
    flag = torch.zeros((), dtype=torch.int64, device=problem.features.device)
    _, denominator, lse, inv_norm, logits = contrast.contrast_forward(problem, Asked(True), flag, 0)
    saved = SimpleNamespace(denominator=denominator, lse=lse, inv_norm=inv_norm, logits=logits)
    one = torch.ones((), device=problem.features.device)
    return {
        "contrast_forward": lambda: contrast.contrast_forward(problem, Asked(True), flag, 0),
        "contrast_backward": lambda: contrast.contrast_backward(one, problem, saved, Asked(features=True), flag, 0),
        "contrast_prototypes": lambda: contrast.contrast_backward(one, problem, saved, Asked(prototypes=True), flag, 0),
        moments.kernel_of(problem): lambda: moments.class_moments(problem, flag),
    }


def _neighbours(settings: dict[str, int]) -> Iterator[dict[str, int]]:
    """Settings one step away."""
    for name, value in settings.items():
        if name == "num_stages":
            steps = [value + 1, value - 1]
        elif name == "num_warps":
            steps = [v for v in (2 * value, value // 2) if v <= 16]
        elif name.startswith("BLOCK_"):
            steps = [v for v in (2 * value, value // 2) if _LEAST_BLOCK <= v <= _MOST_BLOCK]
        else:
            continue
        for step in steps:
            if step >= 1:
                neighbour = {**settings, name: step}
                if name == "num_warps" and "maxnreg" in settings:
                    neighbour["maxnreg"] = min(255, _REGISTERS // (32 * step))
                yield neighbour


def _median_us(call: Callable) -> float:
    if pixels.INTERPRETED:
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    from triton.testing import do_bench

    milliseconds = do_bench(call, warmup=10, rep=40, return_mode="median")
    assert isinstance(milliseconds, float)  # a list is for several quantiles
    return 1e3 * milliseconds


def _alike(got, expected) -> bool:
    def near(a, b):
        tolerance = 1e-4 if a.dtype == torch.float32 and b.dtype == torch.float32 else 2e-2
        return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-30)

    return all(near(a, b) for a, b in zip(got, expected, strict=True))


def tune_kernel(
    kernel: str, call: Callable, condition: dict, dtype: torch.dtype, layout: str, seconds: float
) -> launch.Row | None:
    """The best row found for one kernel, or None where the shipped settings stay the best. `condition`: {"dim": D, "num_classes": K}."""
    arch = "interpreter" if pixels.INTERPRETED else launch.architecture(torch.cuda.current_device())
    settings = launch.find(arch, kernel, dtype, condition["dim"], condition["num_classes"], layout)
    if settings is None:
        return None
    expected, best_us, shipped = call(), _median_us(call), settings
    key = {"kernel": kernel, "dtype": "fp32" if dtype == torch.float32 else "half", "layout": layout, **condition}
    deadline, seen = time.monotonic() + seconds, [settings]
    better = True
    while better and time.monotonic() < deadline:
        better = False
        for candidate in _neighbours(settings):
            if candidate in seen or time.monotonic() > deadline:
                continue
            seen.append(candidate)
            with launch.override({**key, "launch": candidate}):
                try:
                    us = _median_us(call) if _alike(call(), expected) else float("inf")
                except Exception as error:  # too large for the GPU, or for the compiler
                    print(f"  {kernel} {candidate}: {type(error).__name__}", file=sys.stderr)
                    continue
            if us < 0.97 * best_us:  # less is noise
                best_us, settings, better = us, candidate, True
                break
    print(f"{kernel}: {best_us:.1f} us with {settings}" + ("" if settings is not shipped else " (as shipped)"))
    return None if settings is shipped else {**key, "launch": settings}


def tune(
    shape, num_classes: int, dtype: torch.dtype, layout: str, device: torch.device, seconds: float
) -> list[launch.Row]:
    """Rows for the kernels that these sizes use."""
    problem = _problem(shape, num_classes, dtype, layout, device)
    condition = {"dim": shape[1], "num_classes": num_classes}
    rows = []
    calls = _calls(problem)
    resident = holds_tile(problem.features)
    form = contrast.form_of(problem.features, num_classes, True, saves_logits(problem))[0]
    kernels = {
        "contrast_forward_resident" if resident else "contrast_forward": "contrast_forward",
        f"contrast_backward_{form}": "contrast_backward", "contrast_prototypes": "contrast_prototypes",
        moments.kernel_of(problem): moments.kernel_of(problem),
    }  # fmt: skip
    for kernel, group in kernels.items():
        row = tune_kernel(kernel, calls[group], condition, dtype, layout, seconds / len(kernels))
        rows += [row] if row else []
    return rows


def write(rows: list[launch.Row], arch: str) -> None:
    """Put the rows first in the user's table; older rows for the same sizes go."""
    path = launch.user_table_path()
    table = json.loads(path.read_text()) if path.is_file() else {}

    def key(row):
        return {k: v for k, v in row.items() if k != "launch"}

    new = [key(row) for row in rows]
    table[arch] = rows + [row for row in table.get(arch, []) if key(row) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(path)
    launch.forget()


def run(shape: tuple[int, int, int, int], num_classes: int, dtype: str, layout: str, seconds: float) -> None:
    """Tune for features of this shape [B, D, h, w] on the current GPU, and write what is better than the shipped settings."""
    device = torch.device("cpu") if pixels.INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    arch = "interpreter" if pixels.INTERPRETED else launch.architecture(device.index)
    rows = tune(shape, num_classes, getattr(torch, dtype), layout, device, seconds)
    if rows:
        write(rows, arch)
    print(
        f"{len(rows)} rows written to {launch.user_table_path()}"
        if rows
        else "nothing better than the shipped settings was found"
    )
