"""What the Triton backend allocates for a teacher's targets, counted without a GPU: `python -m benchmarks.kernels_check.memory`.

The launchers run on "meta" tensors with the kernels replaced by a recorder, and every tensor that an operation returns is counted from its
birth to its end. `--write`: to benchmarks/results/triton_teacher.json.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from benchmarks import RESULTS
from spcl_fast.backends.contract import Contrast, Saved, Teacher, Wanted
from spcl_fast.kernels import pixels
from spcl_fast.kernels.prototype_contrastive_loss import contrast
from spcl_fast.memory_plan.count import LiveBytes

from .launches import recorded

SAVED = RESULTS / "triton_teacher.json"
CASES = ((65536, 5000, 256), (262144, 5000, 384))  # K, N, D


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def counted(num_classes: int, num_rows: int, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes at the peak of forward and backward, without inputs (prototypes in float32) and gradients; and of one [N, K] tensor."""
    rows = lambda: _meta(num_rows, dim, dtype=dtype).t()[None, :, :, None]  # noqa: E731 - as the op passes [N, D]
    teacher = Teacher(rows(), _meta(num_classes, dim), 0.1, _meta(1, num_rows, dtype=torch.float64), _meta(num_classes))
    problem = Contrast(rows(), teacher, _meta(num_classes, dim), None, None, None, 0.1, True, 255, "mean")
    inputs = [*(part for part in problem if isinstance(part, Tensor)), *(p for p in teacher if isinstance(p, Tensor))]
    wanted, flag = Wanted(features=True, prototypes=True), _meta(dtype=torch.int64)
    with recorded("sm_90"), LiveBytes() as live:
        live.hold((*inputs, flag), "data")
        live.start()
        loss, *saved = contrast.contrast_forward(problem, wanted, flag, 0)
        forward = live.result.peak
        parts = Saved(*saved, problem.features.new_empty(0))
        gradients = contrast.contrast_backward(_meta(*loss.shape), problem, parts, wanted, flag, 0)
        peak = live.result.peak
    given = sum(tensor.nbytes for tensor in inputs) + flag.nbytes
    returned = sum(gradient.nbytes for gradient in gradients)
    return {
        "forward_bytes": forward - given,
        "bytes": peak - given - returned,
        "stored_bytes": 4 * num_rows * num_classes,
    }


def rows() -> list[dict]:
    return [
        {"classes": case[0], "rows": case[1], "dim": case[2], "dtype": str(dtype).removeprefix("torch.")}
        | counted(*case, dtype)
        for case in CASES
        for dtype in (torch.float32, torch.bfloat16)
    ]


def main(argv: list[str]) -> int:
    if pixels.INTERPRETED:
        print("the count needs kernels that are compiled; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    found = json.dumps({"rows": rows()}, indent=1)
    if "--write" in argv:
        SAVED.write_text(found + "\n", encoding="utf-8")
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
