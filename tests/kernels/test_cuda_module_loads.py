"""What the CUDA module is linked against and compiled for; and that it loads beside a CUDA build of torch, which needs no GPU.

The second half needs an interpreter whose torch is a CUDA build and into which spcl_fast was installed: `make cuda-load` makes one.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
VARIABLE = "SPCL_FAST_CUDA_TORCH_PYTHON"
OPS = ("class_moments", "move_prototypes", "prototype_contrastive_forward", "prototype_contrastive_backward",
       "upsampled_cross_entropy", "upsampled_prediction")  # fmt: skip


@pytest.fixture
def build(monkeypatch) -> dict:
    """The functions of setup.py, with an nvcc that knows three architectures."""
    monkeypatch.delenv("SPCL_FAST_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    monkeypatch.chdir(ROOT)
    made = runpy.run_path("setup.py")
    answers = {"--list-gpu-code": "sm_80 sm_90 sm_100", "--version": "release 13.0"}
    answered = types.SimpleNamespace(run=lambda command, **_: types.SimpleNamespace(stdout=answers[command[1]]))
    scope = made["cuda_archs"].__wrapped__.__globals__
    for name, value in (
        ("subprocess", answered),
        ("nvcc_path", lambda: "nvcc"),
        ("cudart_folder", lambda: Path("/lib")),
    ):
        monkeypatch.setitem(scope, name, value)
    return made


def seen(monkeypatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


def test_the_module_is_linked_against_the_library_that_knows_the_current_stream(build):
    assert "torch_cuda" in build["cuda_extension"]().libraries


def test_without_a_gpu_every_architecture_that_nvcc_knows_is_compiled(build, monkeypatch):
    seen(monkeypatch)
    assert build["cuda_archs"]("nvcc") == ["80", "90a", "100"]


def test_the_gpus_that_are_seen_alone_are_compiled_for(build, monkeypatch):
    seen(monkeypatch, (9, 0), (8, 0), (9, 0))
    assert build["cuda_archs"]("nvcc") == ["80", "90a"]


def test_the_variable_decides_over_the_gpu(build, monkeypatch):
    seen(monkeypatch, (9, 0))
    monkeypatch.setenv("SPCL_FAST_CUDA_ARCHS", "80;100")
    assert build["cuda_archs"]("nvcc") == ["80", "100"]


def test_an_architecture_that_nvcc_does_not_know_is_an_error_that_names_those_it_knows(build, monkeypatch):
    monkeypatch.setenv("SPCL_FAST_CUDA_ARCHS", "35")
    with pytest.raises(RuntimeError, match=r"none of the architectures 35.*sm_80 sm_90 sm_100"):
        build["cuda_archs"]("nvcc")


@pytest.fixture
def interpreter(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)  # not the checkout's own spcl_fast
    return os.environ.get(VARIABLE) or pytest.skip(
        f"{VARIABLE} names no interpreter with a CUDA build of torch and spcl_fast: `make cuda-load` makes one"
    )


def asked(*command: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=clean, timeout=600)


@pytest.mark.parametrize("first", ["import torch\n", ""], ids=["after torch", "before torch"])
def test_the_module_loads_beside_a_cuda_build_of_torch(interpreter, first):
    ask = f"{first}import spcl_fast._cuda as m, torch\nfor op in {OPS}: getattr(torch.ops.spcl_fast_cuda, op)\nprint(m.archs)"
    done = asked(interpreter, "-c", ask)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_doctor_finds_the_cuda_part_whole(interpreter):
    done = asked(interpreter, "-m", "spcl_fast", "doctor")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "CUDA part: built with nvcc" in done.stdout and "does not load" not in done.stdout
