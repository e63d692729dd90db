"""Without torch, without a compiler, or on request, the install is pure Python and the package says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"
BUILD = "import runpy, sys; sys.argv = ['setup.py', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
ASK = """
import sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in str(f)]  # a development install would find its own _cpu
import torch
from spcl_fast.backends import cpu
from spcl_fast.backends.contract import Ask
print(cpu.why_not(Ask("class_moments", torch.device("cpu"), torch.float32, num_classes=2, dim=2)))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is built, without anything that was."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    built = shutil.ignore_patterns("_cpu*", "_cuda*", "cpu_build.txt", "cuda_build.txt", "__pycache__")
    for name in ("spcl_fast", "csrc", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
    return tmp_path


def run(checkout: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)} | environment,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "environment", "reason"),
    [
        (WITHOUT_TORCH, {}, "torch was not importable when the package was built"),
        ("", {"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}, "the C++ build failed: "),
        ("", {"CXX": "false", "CC": "false"}, "the C++ build failed: "),
        ("", {"PATH": "/nowhere"}, "the C++ build failed: "),
        ("", {"SPCL_FAST_NO_CPU": "1"}, "SPCL_FAST_NO_CPU was set"),
    ],
    ids=["no torch", "no compiler", "broken compiler", "no compiler and no ninja", "not wanted"],
)
def test_what_cannot_be_built_is_a_reason_and_not_a_failed_install(checkout, before, environment, reason):
    built = run(checkout, before + BUILD, **environment)
    assert built.returncode == 0, built.stderr[-3000:]
    assert reason in (checkout / "spcl_fast" / "cpu_build.txt").read_text()
    assert not list((checkout / "spcl_fast").glob("_cpu*"))
    asked = run(checkout, ASK)
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert f"spcl_fast._cpu was not built: {reason}" in asked.stdout
    assert reason in (checkout / "spcl_fast" / "cuda_build.txt").read_text()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_the_reason_of_a_missing_cuda_part(checkout):
    done = run(
        checkout,
        "import sys; sys.argv = ['setup.py', '--version']\nimport runpy\nprint(runpy.run_path('setup.py')['NO_CUDA'])",
    )
    assert "was built without CUDA; build again next to a CUDA build of torch" in done.stdout


def test_cuda_glue_compiles_beside_a_torch_without_cuda():
    """No header of CUDA or c10/cuda is opened, and only what torch's stable ABI of 2.11 has is used."""
    from torch.utils.cpp_extension import include_paths

    compiler = shutil.which("g++") or pytest.skip("needs g++")
    folders = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    sources = sorted((ROOT / "csrc" / "cuda").rglob("bind*.cpp"))
    assert sources
    flags = [
        "-std=c++20",
        "-fsyntax-only",
        "-fvisibility=hidden",
        "-Wall",
        "-Werror",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    done = subprocess.run([compiler, *flags, *folders, *map(str, sources)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_checkout_that_was_never_built_says_so(checkout):
    assert "was not installed by setup.py" in run(checkout, ASK).stdout
