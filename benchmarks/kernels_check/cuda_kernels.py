"""Compile every CUDA file for sm_80, sm_90a and sm_100 without a GPU: `python -m benchmarks.kernels_check.cuda_kernels [FILE.cu ...]`.

Printed per kernel: registers, stack, spills. Fails on a spill and on a stack frame. Shared memory is dynamic in all of them: the launchers
ask for it, and what they ask for is in the tests of each op; resident blocks are those that threads and registers allow. What a file and
the files that it includes were compiled to is kept in the temporary folder. Where nvcc is not found, says so and fails nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import sass
from .occupancy import resident_blocks

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHS = ("80", "90a", "100")
JOBS = int(os.environ.get("OMP_NUM_THREADS", 2))  # nvcc at the same time
HEADER = f"{'kernel':66} arch     regs  shared stack spills"
_COMMAND = "-std=c++20 -O3, rows of version 1"  # what is kept was made so
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
    threads: int = 0  # of a block at most, as the source promises the compiler; 0: it does not
    listing: sass.Listing | None = None

    @property
    def faulty(self) -> bool:
        return bool(self.stack_bytes or self.spill_bytes)


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compiled(source: Path, arch: str) -> list[Usage]:
    """What ptxas says of every kernel of a file; RuntimeError with nvcc's words where it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [
            nvcc(), "-std=c++20", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v",
            "-cubin", "-o", str(cubin), str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} for sm_{arch}: {done.stderr or done.stdout}")
        found = parsed(done.stderr + done.stdout, arch)
        names = re.findall(r"Function properties for (\S+)", done.stderr + done.stdout)
        listings, threads = sass.listings(cubin), _most_threads(cubin)
    return [
        dataclasses.replace(usage, threads=threads.get(name, 0), listing=listings.get(name))
        for name, usage in zip(names, found, strict=True)
    ]


def _most_threads(cubin: Path) -> dict[str, int]:
    """mangled name -> what __launch_bounds__ says."""
    text = subprocess.run(
        [sass.tool("cuobjdump"), "-elf", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    parts = re.split(r"^\.nv\.info\.(\S+)$", text, flags=re.MULTILINE)[1:]
    found = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        if match := re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\S+\s+Value:\s+(0x[0-9a-f]+)", body):
            found[name] = int(match[1], 16)
    return found


def sources_of(source: Path) -> list[Path]:
    """The file and what it includes of this project, each once."""
    found = [source]
    for file in found:
        for name in re.findall(r'^#include "([^"]+)"', file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            path = (file.parent / name).resolve()
            if path.exists() and path not in found:
                found.append(path)
    return found


def rows_of(source: Path, arch: str) -> list[dict]:
    """Rows of the pinned table; from the temporary folder where the same text was compiled before."""
    digest = hashlib.sha256(f"{_COMMAND} {version()} {arch}".encode())
    for path in sorted(sources_of(source)):
        digest.update(path.read_bytes())
    kept = Path(tempfile.gettempdir()) / "spcl_fast_kernels_check_cuda" / f"{digest.hexdigest()[:24]}.json"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps([_row(usage, source) for usage in compiled(source, arch)]), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def _row(u: Usage, source: Path) -> dict:
    capability = int(re.sub(r"\D", "", u.arch))
    hot = u.listing.hot if u.listing else None
    return {
        "by": "cuda", "kernel": u.kernel, "case": source.name, "arch": f"sm_{u.arch}", "warps": u.threads // 32,
        "registers": u.registers, "static_shared_bytes": u.static_shared_bytes, "stack_bytes": u.stack_bytes, "spill_bytes": u.spill_bytes,
        "resident_blocks": resident_blocks(capability, u.threads, u.registers, 0) if u.threads else None,
        "instructions": u.listing.pipes if u.listing else {}, "loop": hot.pipes if hot else {},
        "loop_bytes": hot.global_bytes if hot else 0,
    }  # fmt: skip


def version() -> str:
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout
    return "".join(re.findall(r"V(\d+\.\d+\.\d+)", text))


def rows(
    wanted: Callable[[str], bool], is_late: Callable[[], bool], archs=ARCHS
) -> Iterator[tuple[dict | None, str, bool]]:
    """As `triton_kernels.rows`."""
    jobs = [(file, arch) for arch in archs for file in sorted(SOURCES.glob("*/*.cu"))]
    jobs = [job for job in jobs if wanted(f"cuda {job[0].name} sm_{job[1]}")]

    def one(job: tuple[Path, str]) -> list[dict] | None:
        return None if is_late() else rows_of(*job)

    with ThreadPoolExecutor(JOBS) as pool:
        for (file, arch), found in zip(jobs, pool.map(one, jobs), strict=True):
            if found is None:
                yield None, f"cuda {file.name} sm_{arch}", False
            for row in found or ():
                faulty = bool(row["stack_bytes"] or row["spill_bytes"])
                yield row, line_of(row) + ("  <-- spills or a stack frame" if faulty else ""), faulty


def line_of(row: dict) -> str:
    return (
        f"{row['kernel']:66} {row['arch']:8} {row['registers']:5} {row['static_shared_bytes']:7} {row['stack_bytes']:5} "
        f"{row['spill_bytes']:6}"
    )


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
        prog="python -m benchmarks.kernels_check.cuda_kernels", description=(__doc__ or "").splitlines()[0]
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
    print(HEADER)
    wrong = 0
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = [(file, arch) for file in files for arch in options.arch]
        for (file, _), usages in zip(jobs, pool.map(lambda job: compiled(*job), jobs), strict=True):
            for u in usages:
                print(line_of(_row(u, file)) + ("  <-- spills or a stack frame" if u.faulty else ""), flush=True)
                wrong += u.faulty
    print(f"{wrong} faulty" if wrong else "no spills, no stack")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
