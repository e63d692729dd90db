"""Compile every CUDA file for sm_80, sm_90a and sm_100 without a GPU: `python -m benchmarks.kernels_check.cuda_kernels [FILE.cu ...]`.

Printed per kernel: registers, stack, spills. Fails on a spill and on a stack frame. Shared memory is dynamic in all of them: the launchers
ask for it, and what they ask for is in the tests of each op. Where nvcc is not found, says so and fails nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHS = ("80", "90a", "100")
_FUNCTION = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
)


@dataclasses.dataclass(frozen=True)
class Usage:
    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int

    @property
    def faulty(self) -> bool:
        return bool(self.stack_bytes or self.spill_bytes)


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compiled(source: Path, arch: str) -> list[Usage]:
    """What ptxas says of every kernel of a file; RuntimeError with nvcc's words where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc(), "-std=c++20", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v",
            "-cubin", "-o", f"{folder}/out.cubin", str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}: {done.stderr or done.stdout}")
    return parsed(done.stderr + done.stdout, arch)


def parsed(text: str, arch: str) -> list[Usage]:
    found = [
        Usage(_plain(name), arch, int(registers), int(stack), int(stores) + int(loads), int(shared or 0))
        for name, stack, stores, loads, registers, shared in _FUNCTION.findall(text)
    ]
    entries = re.findall(r"Compiling entry function '(\S+)'", text)
    if len(found) != len(entries):
        raise RuntimeError(f"ptxas compiled {len(entries)} kernels and {len(found)} were understood:\n{text}")
    return found


def _plain(mangled: str) -> str:
    """upsampled_kernel<float, 4> instead of _ZN4spcl..."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return mangled
    name = subprocess.run([tool, mangled], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|spcl::gpu::|^void ", "", name)
    return re.sub(r"\((?:int|bool|unsigned int)\)", "", name.rpartition("(")[0] or name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels_check.cuda_kernels", description=__doc__.splitlines()[0]
    )
    parser.add_argument("files", nargs="*", type=Path, help="default: every .cu of csrc/cuda")
    parser.add_argument("--arch", nargs="*", default=list(ARCHS))
    options = parser.parse_args(argv)
    if nvcc() is None:
        print("nvcc was not found: the CUDA kernels were not compiled")
        return 0
    files = options.files or sorted(SOURCES.glob("*/*.cu"))
    if not files:
        print(f"no CUDA sources in {SOURCES}")
        return 1
    print(f"{'kernel':66} arch     regs  shared stack spills")
    wrong = 0
    with ThreadPoolExecutor(2) as pool:
        for usages in pool.map(lambda job: compiled(*job), [(file, arch) for file in files for arch in options.arch]):
            for u in usages:
                line = f"{u.kernel:66} sm_{u.arch:<5} {u.registers:5} {u.static_shared_bytes:7} {u.stack_bytes:5} {u.spill_bytes:6}"
                print(line + ("  <-- spills or a stack frame" if u.faulty else ""), flush=True)
                wrong += u.faulty
    print(f"{wrong} faulty" if wrong else "no spills, no stack")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
