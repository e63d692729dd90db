"""The cuda backend on CPU tensors: its own glue and kernels, in the emulator.

cuda = emulated.Backend("class_moments")     # builds and loads; pytest's monkeypatch is not needed
with cuda.taken():                           # sf.class_moments(..., backend="cuda") now works on CPU tensors

`taken_on_demand` does so for every op and builds what is called; `claimed` lets the backend answer as if that were so, and builds nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from spcl_fast.backends import cuda
from spcl_fast.backends.labels import label_flag

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
        before, cuda._ops = cuda._ops, self.ops
        try:
            with claimed(), allocated_full_of_nan(), build.order(self.handle, order):
                yield
        finally:
            cuda._ops = before
        self.check()

    def check(self) -> None:
        damage = self.handle.emulator_damage()
        assert damage is None, damage.decode()


@contextlib.contextmanager
def claimed() -> Iterator[None]:
    """The cuda backend answers as if its kernels were there, for CPU tensors."""
    before = cuda._DEVICES, cuda.missing
    if build.COMPILER is not None:
        cuda._DEVICES, cuda.missing = ("cuda", "cpu"), lambda: None
    try:
        yield
    finally:
        cuda._DEVICES, cuda.missing = before


class _FullOfNaN:
    """torch for the cuda backend, whose empty_like hands out NaN, as what the kernels allocate is: an element that is forgotten stays NaN,
    instead of being right because its memory held the right result of the call before. (torch itself stays as it is: torch.compile keeps a
    list of its functions.)"""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def empty_like(*args, **kwargs) -> torch.Tensor:
        made = torch.empty_like(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made


@contextlib.contextmanager
def allocated_full_of_nan() -> Iterator[None]:
    cuda.torch = _FullOfNaN()  # type: ignore[assignment]
    try:
        yield
    finally:
        cuda.torch = torch


def is_taken() -> bool:
    return "cpu" in cuda._DEVICES


# ---- what the tests of the ops share ---------------------------------------------------------------------------------


class _OnDemand:
    """torch.ops.spcl_fast_cuda: the folder of an op is built and loaded when it is first called."""

    def __init__(self) -> None:
        self.order = "forward"
        self.loaded: dict[str, Backend] = {}

    def __getattr__(self, op: str):
        folder = _folder_of(op)
        if folder not in self.loaded:
            self.loaded[folder] = Backend(folder)
        self.loaded[folder].handle.emulator_order(*build.ORDERS[self.order])
        return getattr(self.loaded[folder].ops, op)


@functools.cache
def _folder_of(op: str) -> str:
    return next(path.parent.name for path in build.CUDA.glob("*/bind_*.cpp") if f'm.impl("{op}"' in path.read_text())


_on_demand = _OnDemand()


@contextlib.contextmanager
def taken_on_demand() -> Iterator[None]:
    """backend="cuda" means the emulated kernels of every op, on CPU tensors."""
    flag, before = label_flag(torch.device("cpu")), cuda._ops
    flag.fill_(torch.iinfo(torch.int64).min)
    cuda._ops = _on_demand
    try:
        with claimed(), allocated_full_of_nan():
            yield
    finally:
        cuda._ops = before
        flag.fill_(torch.iinfo(torch.int64).min)
    for backend in _on_demand.loaded.values():
        backend.check()


def in_each_order() -> Iterator[None]:
    """Threads, blocks and clusters take turns in one order after the other."""
    try:
        for _on_demand.order in build.ORDERS:
            yield
    finally:
        _on_demand.order = "forward"


@contextlib.contextmanager
def guarded() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A function that copies a tensor to where its memory ends with its last element; one with gaps or an offset is left where it is."""
    memory = build.Guarded(_memory())

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        whole = tensor.numel() == last + 1 and tensor.storage_offset() == 0
        return memory.copy(tensor, alignment=tensor.element_size()) if whole else tensor

    try:
        yield copy
    finally:
        memory.close()


@functools.cache
def _memory() -> ctypes.CDLL:
    return build.load(build.library("memory", []))


@functools.cache
def _torch_flags() -> tuple[str, ...]:
    torch_lib = Path(torch.__file__).parent / "lib"
    return (
        *(f"-isystem{path}" for path in include_paths()), f"-isystem{sysconfig.get_paths()['include']}",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-L{torch_lib}", f"-Wl,-rpath,{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10",
    )  # fmt: skip
