"""`make kernels-check` for the CUDA files: what compiles is compiled without a GPU, and a stack frame fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kernels_check import cuda_kernels as check_cuda

NEEDS_NVCC = pytest.mark.skipif(check_cuda.nvcc() is None, reason="needs nvcc")
STACK = """
__global__ void stacked_kernel(int* p, int i) {
  int many[64];
  for (int j = 0; j < 64; ++j) many[(j * p[64]) & 63] = p[j];
  p[0] = many[i];
}
"""


@NEEDS_NVCC
def test_the_kernel_that_moves_the_prototypes_compiles_without_spills(capsys):
    assert check_cuda.main([str(check_cuda.SOURCES / "class_moments" / "move_prototypes.cu"), "--arch", "90a"]) == 0
    out = capsys.readouterr().out
    assert "move_kernel" in out and "sm_90a" in out and "no spills, no stack" in out


@NEEDS_NVCC
def test_a_kernel_with_a_stack_frame_fails(tmp_path: Path, capsys):
    (tmp_path / "stacked.cu").write_text(STACK)
    assert check_cuda.main([str(tmp_path / "stacked.cu"), "--arch", "80"]) == 1
    assert (
        "stacked_kernel" in (out := capsys.readouterr().out)
        and "<-- spills or a stack frame" in out
        and "1 faulty" in out
    )


@NEEDS_NVCC
def test_what_does_not_compile_is_said_in_nvccs_words(tmp_path: Path):
    (tmp_path / "broken.cu").write_text("__global__ void k() { nothing(); }")
    with pytest.raises(RuntimeError, match='broken.cu for sm_80: .*"nothing" is undefined'):
        check_cuda.main([str(tmp_path / "broken.cu"), "--arch", "80"])


def test_without_nvcc_it_says_so_and_fails_nothing(monkeypatch, capsys):
    monkeypatch.setattr(check_cuda, "nvcc", lambda: None)
    assert check_cuda.main([]) == 0
    assert "nvcc was not found" in capsys.readouterr().out


def test_a_line_of_ptxas_that_is_not_understood_is_no_clean_result():
    with pytest.raises(RuntimeError, match="1 kernels and 0 were understood"):
        check_cuda.parsed(
            "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'\nptxas info    : something new", "90a"
        )
