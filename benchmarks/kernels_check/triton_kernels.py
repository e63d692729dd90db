"""Compile every Triton kernel for sm_80 and sm_90 without a GPU: `python -m benchmarks.kernels_check.triton_kernels [--quick]`.

The launchers run on "meta" tensors of the quoted shapes while the kernels are replaced by a recorder; each recorded launch is compiled with
the very specialisation (types, divisibility, ones, settings) it would have on a GPU. Printed per kernel: registers, shared memory, stack,
which matrix instruction, 16-byte loads. Fails on a spill, on more shared memory than the architecture has, on a half-float dot without a
matrix instruction, and on an aligned feature map that is not loaded 16 bytes at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from spcl_fast.kernels import pixels

from . import sass
from .launches import Launch, cases, recorded
from .occupancy import resident_blocks

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
PINNED = (80, 90)  # architectures; Triton 3.7 compiles no tile as small as these for sm_100
PINNED_DTYPES = (torch.float32, torch.bfloat16)  # float16 compiles to what bfloat16 does, with other conversions


@dataclasses.dataclass(frozen=True)
class Usage:
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix: str  # wgmma | mma | fma
    wide_loads: int  # 16-byte loads from global memory
    warps: int
    cubin: bytes = dataclasses.field(repr=False)


def compiled(launch: Launch, capability: int) -> Usage:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    attributes = {path: backend.parse_attr(text) for path, text in launch.attributes}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    binary = triton.compile(source, target=target, options=dict(launch.options))
    ptx = binary.asm["ptx"]
    wide = len(
        re.findall(
            r"cp\.async\.cg\.shared\.global|ld\.global[\w:.]*\.v4\.(?:b32|u32|f32)|ld\.global[\w:.]*\.v2\.b64", ptx
        )
    )
    matrix = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "fma"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [sass.tool("cuobjdump"), "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    spilled, warps = used["STACK"] + used["LOCAL"], binary.metadata.num_warps
    return Usage(used["REG"], spilled, binary.metadata.shared, matrix, wide, warps, binary.asm["cubin"])


def faults(launch: Launch, usage: Usage, capability: int) -> list[str]:
    found = []
    if usage.registers * 32 * usage.warps > 65536:
        found.append(f"{32 * usage.warps} threads of {usage.registers} registers do not fit a multiprocessor")
    if usage.stack_bytes:
        found.append(f"{usage.stack_bytes} bytes spilled")
    if usage.shared_bytes > SHARED_BYTES[capability]:
        found.append(f"{usage.shared_bytes} bytes of shared memory, the architecture has {SHARED_BYTES[capability]}")
    names = [name for name, _ in launch.signature]
    if _has_a_dot(launch, names):
        half = launch.dtype in ("bf16", "fp16") or launch.constant("PRECISION") == "tf32"
        if half and usage.matrix == "fma":
            found.append("no matrix instruction")
        if _wide_rows(launch, names) and not usage.wide_loads:
            found.append("no 16-byte load of an aligned feature map")
    return found


def _has_a_dot(launch: Launch, names: list[str]) -> bool:
    from_features = "features" in names and dict(launch.signature).get("logits_ptr", "constexpr") == "constexpr"
    return from_features and ("PRECISION" in names or "resident" in launch.name)


def _wide_rows(launch: Launch, names: list[str]) -> bool:
    """Whether the feature map's rows follow each other and every stride and the number of pixels is a multiple of 16, or 1."""
    known = {path for path, _ in (*launch.constants, *launch.attributes)}

    def at(name: str, field: str) -> tuple[int, int]:
        return names.index(name), dict(launch.fields)[name].index(field)

    flat = dict(launch.constants).get(at("features", "stride_h"), 0) is None
    aligned = {at("features", "stride_b"), at("features", "stride_d"), at("features", "stride_w"), at("size", "P")}
    return flat and aligned <= known


HEADER = "kernel             dtype arch   warps stages  regs  shared stack dot     16B  blocks"


def _line(launch: Launch, usage: Usage, capability: int) -> str:
    options = dict(launch.options)
    blocks = [f"{name}={value}" for name, value in _blocks(launch)]
    return (
        f"{launch.name:18} {launch.dtype:5} sm_{capability:<3} {options.get('num_warps', 4):5} {options.get('num_stages', 3):6} "
        f"{usage.registers:5} {usage.shared_bytes:7} {usage.stack_bytes:5} {usage.matrix:6} {usage.wide_loads:4}  {' '.join(blocks)}"
    )


def launches_of(capability: int, quick: bool, dtypes: tuple[torch.dtype, ...] = ()) -> dict[Launch, list[str]]:
    """Every launch that compiles to something of its own -> the cases that make it."""
    found: dict[Launch, list[str]] = {}
    with recorded(f"sm_{capability}") as launches:
        for name, call in cases(quick, dtypes):
            call()
            for launch in launches:
                if name not in (names := found.setdefault(launch, [])):
                    names.append(name)
            launches.clear()
    return found


def row_of(launch: Launch, usage: Usage, capability: int, names: list[str], number: int) -> dict:
    """Of the pinned table. number: of this kernel among those that the case launches."""
    listing = next(iter(sass.listings(usage.cubin).values()))
    hot, options = listing.hot, dict(launch.options)
    again = f" {number}" if number > 1 else ""
    return {
        "by": "triton", "kernel": launch.name, "case": f"{names[0]} {launch.dtype}{again}", "arch": f"sm_{capability}", "also": names[1:],
        "blocks": dict(_blocks(launch)), "warps": usage.warps, "stages": options.get("num_stages", 3), "registers": usage.registers,
        "shared_bytes": usage.shared_bytes, "stack_bytes": usage.stack_bytes, "matrix": usage.matrix,
        "resident_blocks": resident_blocks(capability, 32 * usage.warps, usage.registers, usage.shared_bytes),
        "instructions": listing.pipes, "loop": hot.pipes if hot else {}, "loop_bytes": hot.global_bytes if hot else 0,
    }  # fmt: skip


def _blocks(launch: Launch) -> Iterator[tuple[str, object]]:
    for name, _ in launch.signature:
        if name.startswith("BLOCK") or name in ("ROWS", "COLS", "TAIL"):
            yield name.removeprefix("BLOCK_"), launch.constant(name)


def rows(
    capability: int, wanted: Callable[[str], bool], is_late: Callable[[], bool]
) -> Iterator[tuple[dict | None, str, bool]]:
    """A row, its line for the terminal and whether it is faulty; None where there is no time left for it."""
    numbers: dict[tuple[str, str], int] = {}
    for launch, names in launches_of(capability, False, PINNED_DTYPES).items():
        same = (launch.name, f"{names[0]} {launch.dtype}")
        numbers[same] = numbers.get(same, 0) + 1
        title = f"triton {launch.name} {names[0]} {launch.dtype} sm_{capability}"
        if not wanted(title):
            continue
        if is_late():
            yield None, title, False
            continue
        usage = compiled(launch, capability)
        found = faults(launch, usage, capability)
        line = _line(launch, usage, capability) + "".join(f"  <-- {text}" for text in found)
        yield row_of(launch, usage, capability, names, numbers[same]), line, bool(found)


def main(argv: list[str] | None = None) -> int:
    """Everything that is launched, pinned or not."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels_check.triton_kernels", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="default settings, fewer dtypes and layouts (for the test suite)"
    )
    parser.add_argument("--kernel", nargs="*", default=[], help="only kernels whose name has one of these words")
    parser.add_argument("--capability", type=int, nargs="*", default=[80, 90], choices=sorted(SHARED_BYTES))
    options = parser.parse_args(argv)
    if pixels.INTERPRETED:
        print("kernels-check compiles; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    print(HEADER)
    wrong = 0
    for capability in options.capability:
        for launch in launches_of(capability, options.quick):
            if options.kernel and not any(word in launch.name for word in options.kernel):
                continue
            usage = compiled(launch, capability)
            found = faults(launch, usage, capability)
            wrong += bool(found)
            print(_line(launch, usage, capability) + "".join(f"  <-- {text}" for text in found), flush=True)
    print(f"{wrong} faulty" if wrong else "no spills, shared memory within limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "spcl_fast_kernels_check"))
    sys.exit(main())
