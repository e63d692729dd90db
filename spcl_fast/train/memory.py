"""Peak memory of this process, on the CPU (resident set) or on a GPU (allocated by torch), in bytes; of a step also by phase."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

from ..config import LoopConfig
from ..runs.layout import PHASES

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Start counting the peak anew. False where the system cannot do so: the peak then stays that of the whole process."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    _give_back_freed_memory()
    try:
        _CLEAR_REFS.write_text("5")  # 5 = set the resident peak back to what is resident now (Linux >= 4.0)
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """Peak since the last reset: allocated bytes of that GPU, or resident bytes of this process (its children not counted)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM") or _rusage_bytes()


def resident_bytes() -> int:
    """What is resident now; the peak where the system does not say."""
    return _status_bytes("VmRSS") or _rusage_bytes()


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let malloc keep freed blocks for this process's next tensors, from now on; False where the system's malloc is not glibc's.

    As it comes, large tensors are mapped and unmapped one by one, and every page is faulted in anew: a quarter of a training step on a CPU.
    """
    mallopt = _glibc("mallopt")
    return (
        mallopt is not None and mallopt(_MMAP_THRESHOLD, 1 << 30) == 1 and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1) == 1
    )


def _give_back_freed_memory() -> None:
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _glibc(function: str):
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


# ---- out of memory -------------------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator, the CPU's (torch raises a plain RuntimeError there), or Python's own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def release(device: torch.device) -> None:
    """Give freed blocks back, so that a checkpoint can be written."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        _give_back_freed_memory()


def next_setting(settings: LoopConfig, stage: str, device: torch.device) -> str:
    """The next setting to change: first those with which the same run goes on, then those that change its numbers."""
    same_run = (
        (settings.checkpoint != "auto" and not settings.compile, "--loop.checkpoint auto"),
        (not settings.offload and device.type == "cuda", "--loop.offload"),
    )
    new_run = (
        (settings.precision == "fp32", "--loop.precision bf16"),
        (not settings.absorb_gradients, "--loop.absorb_gradients (with sgd)"),
        (settings.accumulate == 1, f"--loop.accumulate N, with N a divisor of {stage}.batch_size,"),
        (True, "a smaller --source.size and --target.size"),
    )
    flag = next((flag for wanted, flag in same_run if wanted), None)
    if flag is not None:
        advice = f"Start the same command with {flag} to go on"
    else:
        advice = f"Start a run of another name with {next(flag for wanted, flag in new_run if wanted)}"
    return f"{advice}; `spcl-fast plan {stage} --fit 4GiB`, with your memory, finds what fits."


# ---- phases of a step ----------------------------------------------------------------------------------------------------------------

_recorder: PhaseRecorder | None = None


class PhaseRecorder:
    """What wants to know in which phase a step is; `enter` is called at every change."""

    phase = "step"

    def enter(self, name: str) -> None:
        self.phase = name


Recorder = TypeVar("Recorder", bound=PhaseRecorder)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Tell the recorder, if there is one, that a step is in this phase now. Nested: the inner one counts."""
    if _recorder is None:
        yield
        return
    outer = _recorder.phase
    _recorder.enter(name)
    try:
        yield
    finally:
        if _recorder is not None:
            _recorder.enter(outer)


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Inside, phases are reported to `recorder`."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield recorder
    finally:
        _recorder = before


class PhasePeaks(PhaseRecorder):
    """Measured peak of each phase of one step. A reading at each change of phase, so for one step, not for all: on the CPU the system walks
    the page tables for it.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.peaks: dict[str, int] = {}
        reset_peak(self.device)

    def enter(self, name: str) -> None:
        if name in PHASES:  # copies to the host are part of the phase they fall into
            self.close()
            super().enter(name)

    def close(self) -> None:
        """Read the peak of the phase that ends."""
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), peak_bytes(self.device))
        reset_peak(self.device)


def _status_bytes(key: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)


def _rusage_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
