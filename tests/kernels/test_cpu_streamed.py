"""Classes that are streamed: the memory of a large head, Sinkhorn's half-steps, and weighted class moments' sums."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from spcl_fast.backends import cpu
from spcl_fast.backends.contract import Ask, Balance

REASON = cpu.why_not(Ask("balance_", torch.device("cpu"), torch.float32, num_classes=2, dim=2))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

MEMORY = """
import resource, sys, torch
from spcl_fast.backends import cpu
from spcl_fast.backends.contract import Contrast, Teacher, Wanted

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def run(features, prototypes, teacher):
    variances = 0.01 * prototypes.square() if sys.argv[1] == "variances" else None
    loss = "sigmoid" if sys.argv[1] == "sigmoid" else "softmax"
    c = Contrast(features, teacher, prototypes, None, None, variances, 0.1, True, 255, "mean", loss=loss)
    wanted = Wanted(True, True)
    loss, saved = cpu.contrast_forward(c, wanted)
    return loss, cpu.contrast_backward(torch.ones(()), c, saved, wanted)

def problem(classes, pixels, dim):
    features, prototypes = torch.randn(1, dim, 1, pixels), torch.randn(classes, dim) / dim**0.5
    scores = torch.randn(1, dim, 1, pixels) / dim**0.5, torch.randn(classes, dim) / dim**0.5, 0.06
    return features, prototypes, Teacher(*scores, torch.full((1, pixels), -11.0), torch.zeros(classes))

run(*problem(100, 70, 64))
inputs = problem(65536, 700, 256)
inputs_of_run = 1 + (sys.argv[1] == "variances")  # the variances are one, too
gradients = [torch.ones_like(inputs[1]) for _ in range(inputs_of_run)]  # their pages are counted before and after
before = peak_mb()
del gradients
loss, _ = run(*inputs)
print(peak_mb() - before, float(loss))
"""


@pytest.mark.parametrize("option", ["softmax", "variances", "sigmoid"])
def test_a_head_of_65536_classes_with_a_teacher_takes_less_than_64_mb_next_to_inputs_and_gradients(option):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, option], cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    megabytes, loss = map(float, done.stdout.split())
    assert megabytes < 64, f"forward and backward took {megabytes:.0f} MB; [700, 65536] float32 is 183 MB"
    assert 0 < loss < (1e6 if option == "sigmoid" else 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(7, 3), (300, 70), (65, 500)])
def test_a_half_step_of_sinkhorn_is_the_logsumexp_of_all_scores(sizes, dtype):
    n, k = sizes
    features, prototypes = (
        F.normalize(torch.randn(n, 40), dim=1).to(dtype),
        F.normalize(torch.randn(k, 40), dim=1).to(dtype),
    )
    u, v = torch.randn(n), torch.randn(k)
    scores = features.double() @ prototypes.double().T / 0.05
    problem = Balance(features, prototypes, 0.05)
    rows, columns = cpu.balance_rows(problem, v), cpu.balance_columns(problem, u)
    assert rows.dtype == columns.dtype == torch.float32
    assert torch.allclose(rows.double(), (scores + v).logsumexp(1), rtol=2e-6, atol=2e-5)
    assert torch.allclose(columns.double(), (scores + u[:, None]).logsumexp(0), rtol=2e-6, atol=2e-5)
