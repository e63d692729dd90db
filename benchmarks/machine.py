"""What a result says about the machine it comes from."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def processor() -> str:
    """The processor's name as the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def instructions() -> str | None:
    """The instruction set that the C++ ops run with: "avx512", "avx2" or "baseline"; None where they were not built."""
    try:
        from spcl_fast import _cpu
    except ImportError:
        return None
    return _cpu.cpu_capability()


def describe_cpu(threads: int) -> dict:
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": instructions(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": today(),
    }


def describe_gpu() -> dict:
    import triton

    facts = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return facts
