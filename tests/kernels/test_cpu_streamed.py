"""Classes that are streamed: the memory of a large head."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spcl_fast.backends import cpu
from spcl_fast.backends.contract import Ask

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

def inputs_of(classes, pixels, dim):
    features, prototypes = torch.randn(1, dim, 1, pixels), torch.randn(classes, dim) / dim**0.5
    scores = torch.randn(1, dim, 1, pixels) / dim**0.5, torch.randn(classes, dim) / dim**0.5, 0.06
    return features, prototypes, Teacher(*scores, torch.full((1, pixels), -11.0), torch.zeros(classes))

run(*inputs_of(100, 70, 64))
inputs = inputs_of(65536, 700, 256)
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
