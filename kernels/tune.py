"""Find launch settings on this GPU and write them into the user's table: `python -m spcl_fast.kernels.tune --dim 256 --classes 19`.

One setting after the other is doubled, halved or stepped as long as that is faster (a few dozen compilations, some minutes). A candidate
whose results differ from the shipped settings' by more than rounding, or that does not fit the GPU, is dropped. The table
(`launch.user_table_path()`) is looked at before the shipped one, from the next process on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from . import class_moments as moments
from . import launch, pixels
from .prototype_contrastive_loss import backward as contrast_backward
from .prototype_contrastive_loss import forward as contrast

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LEAST_BLOCK, _MOST_BLOCK = 16, 256


def _problem(shape, num_classes: int, dtype: torch.dtype, layout: str, device: torch.device) -> dict:
    batch, dim, height, width = shape
    features = torch.randn(shape, device=device).to(dtype)
    if layout == "channels":
        features = features.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, num_classes, (batch, -(-height // 8), -(-width // 8)), device=device)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].contiguous()
    prototypes = F.normalize(torch.randn(num_classes, dim, device=device), dim=1).to(dtype)
    return {"features": features, "labels": labels, "prototypes": prototypes, "num_classes": num_classes}


def _calls(problem: dict) -> dict[str, Callable]:
    """What is timed for each group of kernels: name prefix -> call that returns tensors."""
    features, labels, prototypes = problem["features"], problem["labels"], problem["prototypes"]
    common = {"temperature": 0.1, "normalize": True, "ignore_index": 255, "reduction": "mean"}
    inputs = (features, labels, prototypes, None, None, None)
    _, denominator, *saves = contrast.prototype_contrastive_forward(*inputs, **common, save=True)
    one = torch.ones((), device=features.device)

    def backward(dfeatures: bool, dprototypes: bool):
        return contrast_backward.prototype_contrastive_backward(
            one, *inputs, *saves, denominator, **common, needs_dfeatures=dfeatures, needs_dprototypes=dprototypes
        )

    def sums():
        return moments.class_moments(
            features, labels, problem["num_classes"], normalize=True, squares=False, ignore_index=255
        )

    return {
        "contrast_forward": lambda: contrast.prototype_contrastive_forward(*inputs, **common, save=True),
        "contrast_backward": lambda: backward(True, False),
        "contrast_prototypes": lambda: backward(False, True),
        "moments": sums,
    }


def _neighbours(settings: dict[str, int]) -> Iterator[dict[str, int]]:
    """Settings one step away."""
    for name, value in settings.items():
        if name == "num_stages":
            steps = [value + 1, value - 1]
        elif name == "num_warps":
            steps = [v for v in (2 * value, value // 2) if v <= 8]
        elif name.startswith("BLOCK_"):
            steps = [v for v in (2 * value, value // 2) if _LEAST_BLOCK <= v <= _MOST_BLOCK]
        else:
            continue
        yield from ({**settings, name: step} for step in steps if step >= 1)


def _median_us(call: Callable) -> float:
    if pixels.INTERPRETED:
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return 1e3 * do_bench(call, warmup=10, rep=40, return_mode="median")


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
    """Rows for the kernels that these sizes use, but the separate pass for norms of deep features."""
    problem = _problem(shape, num_classes, dtype, layout, device)
    condition = {"dim": shape[1], "num_classes": num_classes}
    rows = []
    calls = _calls(problem)
    resident = contrast._resident(shape[1], dtype)
    form = contrast_backward._form(
        problem["features"], num_classes, contrast.saves_logits(num_classes, shape[1], dtype)
    )[0]
    kernels = {
        "contrast_forward_resident" if resident else "contrast_forward": "contrast_forward",
        f"contrast_backward_{form}": "contrast_backward", "contrast_prototypes": "contrast_prototypes", "moments": "moments",
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spcl_fast.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dim", type=int, required=True, help="channels of the features")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(256, 512), metavar=("HEIGHT", "WIDTH"), help="of the features"
    )
    parser.add_argument("--classes", type=int, required=True, help="classes or prototypes")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    parser.add_argument("--layout", choices=("pixels", "channels"), default="pixels", help="NCHW or channels_last")
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() and not pixels.INTERPRETED:
        print("tune measures: it needs an NVIDIA GPU", file=sys.stderr)
        return 2
    device = torch.device("cpu") if pixels.INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    arch = "interpreter" if pixels.INTERPRETED else launch.architecture(device.index)
    shape = (options.batch, options.dim, *options.size)
    rows = tune(shape, options.classes, _DTYPES[options.dtype], options.layout, device, options.seconds)
    if rows:
        write(rows, arch)
    print(
        f"{len(rows)} rows written to {launch.user_table_path()}"
        if rows
        else "nothing better than the shipped settings was found"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
