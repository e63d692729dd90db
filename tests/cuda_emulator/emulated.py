"""The cuda backend on CPU tensors: its own glue and kernels, in the emulator.

cuda = emulated.Backend("class_moments")     # builds and loads; pytest's monkeypatch is not needed
with cuda.taken():                           # sf.class_moments(..., backend="cuda") now works on CPU tensors
"""

from __future__ import annotations

import contextlib
import functools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from spcl_fast.backends import cuda

from . import build


class Backend:
    def __init__(self, *ops: str, replace: tuple[tuple[str, str, str], ...] = (), counted: bool = False) -> None:
        """ops: folders of csrc/cuda. replace: (file name, old, new) plants a bug. counted: for benchmarks.traffic."""
        self.name = f"spcl_fast_cuda_{build.digest(repr(ops), repr(replace), repr(counted))}"
        files = [file for op in ops for kind in ("*.cu", "bind_*.cpp") for file in sorted((build.CUDA / op).glob(kind))]
        sources = [str(file.relative_to(build.ROOT)) for file in files]
        self.path = build.library(self.name, sources, replace, _torch_flags(), counted)
        os.environ["SPCL_EMULATED_NAME"] = self.name  # read by the library's registration
        self.handle = build.load(self.path)
        torch.ops.load_library(str(self.path))
        self.ops = getattr(torch.ops, self.name)

    @contextlib.contextmanager
    def taken(self, order: str = "forward") -> Iterator[None]:
        """backend="cuda" means this one, on CPU tensors; threads and blocks take turns in this order."""
        before = cuda._ops, cuda._DEVICES, cuda.missing
        cuda._ops, cuda._DEVICES, cuda.missing = self.ops, ("cuda", "cpu"), lambda: None
        try:
            with build.order(self.handle, order):
                yield
        finally:
            cuda._ops, cuda._DEVICES, cuda.missing = before
        damage = self.handle.emulator_damage()
        assert damage is None, damage.decode()


@functools.cache
def _torch_flags() -> tuple[str, ...]:
    torch_lib = Path(torch.__file__).parent / "lib"
    return (
        *(f"-isystem{path}" for path in include_paths()), f"-isystem{sysconfig.get_paths()['include']}",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-L{torch_lib}", f"-Wl,-rpath,{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10",
    )  # fmt: skip
