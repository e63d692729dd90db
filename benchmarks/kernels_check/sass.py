"""What the disassembly of a cubin says without a GPU: instructions by pipe, of a whole kernel and of its innermost loops.

`listings(cubin)` gives a `Listing` per kernel. The pipes are those that an instruction is issued to on sm_80 to sm_100: `tensor` (matrix
instructions), `fma` (float32 and packed half arithmetic, integer multiply-add), `alu` (integers, compares, moves), `xu` (exponentials,
logarithms, reciprocals, conversions), `lsu` (every access to memory, and shuffles), `fp64`, `uniform` (once per warp), `control`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

_PIPES = {
    "tensor": r"[HIDBQO]?G?MMA|UTC\w*MMA",
    "fma": r"FFMA2?|FMUL2?|FADD2?|HFMA2|HADD2|HMUL2|IMAD|IDP|FFMA32I|FMUL32I|FADD32I",
    "fp64": r"D(?:ADD|MUL|FMA|SETP|MNMX)",
    "xu": r"MUFU|[IF]2[IF]P?|F2FP?|I2FP|FRND|POPC|FLO|BREV",
    "lsu": r"LD|ST|LDG|STG|LDS|STS|LDL|STL|LDC|LDSM|STSM|LDGSTS|ATOM[GS]?|REDG?|SHFL|UBLK\w+|UTMA\w+|CCTL\w*|SYNCS|STAS|MATCH",
    "control": r"BRA|BRX|BSSY|BSYNC|BREAK|EXIT|RET|CALL|NOP|BAR|WARPSYNC|WARPGROUP\w*|DEPBAR|LDGDEPBAR|ARRIVES|MEMBAR|ERRBAR|FENCE|YIELD|"
    r"NANOSLEEP|KILL|ACQBULK|UCGABAR\w*|ELECT|CGAERRBAR|WARPARRIVE",
    "uniform": r"U[A-Z]\w*|R2UR|S2UR|VOTEU",
}  # fmt: skip
PIPES = (*_PIPES, "alu")
_PIPE = [(pipe, re.compile(pattern)) for pipe, pattern in _PIPES.items()]
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)(.*)")
_LABEL = re.compile(r"(\.L_x_\d+):")
_WIDTH = {
    "128": 16,
    "64": 8,
    "256": 32,
    "U8": 1,
    "S8": 1,
    "U16": 2,
    "S16": 2,
}  # of an access; 4 bytes where it names none


class Loop(NamedTuple):
    pipes: dict[str, int]  # instructions per trip, those of zero left out
    global_bytes: int  # that a thread asks of global memory per trip


class Listing(NamedTuple):
    pipes: dict[str, int]
    loops: tuple[Loop, ...]  # the innermost ones, in order

    @property
    def hot(self) -> Loop | None:
        """The loop that streams: of those that read global memory the longest, else the longest."""
        return max(self.loops, key=lambda loop: (loop.global_bytes > 0, sum(loop.pipes.values())), default=None)


class _Instruction(NamedTuple):
    name: str
    suffix: str
    rest: str


def pipe_of(name: str) -> str:
    return next((pipe for pipe, pattern in _PIPE if pattern.fullmatch(name)), "alu")


def tool(name: str) -> str:
    """Of triton's package, else of the PATH."""
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(own) if own.exists() else name


def listings(cubin: bytes | Path) -> dict[str, Listing]:
    """mangled name of a kernel -> its listing."""
    if isinstance(cubin, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return listings(Path(file.name))
    done = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], check=True, capture_output=True, text=True)
    return parsed(done.stdout)


def parsed(text: str) -> dict[str, Listing]:
    parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+).*$", text, flags=re.MULTILINE)[1:]
    return {name: _listing(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def _listing(body: str) -> Listing:
    code, labels = [], {}
    for line in body.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif (found := _INSTRUCTION.match(line)) and found[2] != "NOP":
            code.append(_Instruction(found[2], found[3], found[4]))
    spans = _innermost(_backward_branches(code, labels))
    return Listing(_pipes(code), tuple(_loop(code[first : last + 1]) for first, last in spans))


def _backward_branches(code: list[_Instruction], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    for at, one in enumerate(code):
        target = re.search(r"\.L_x_\d+", one.rest) if one.name == "BRA" else None
        if target and labels.get(target[0], len(code)) < at:
            yield labels[target[0]], at


def _innermost(spans: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without those around another."""
    found = sorted(set(spans))
    return [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]


def _loop(code: list[_Instruction]) -> Loop:
    return Loop(_pipes(code), sum(_bytes(one) for one in code if one.name in ("LDG", "LDGSTS", "LD")))


def _bytes(one: _Instruction) -> int:
    return next((_WIDTH[part] for part in one.suffix.split(".") if part in _WIDTH), 4)


def _pipes(code: list[_Instruction]) -> dict[str, int]:
    counts = Counter(pipe_of(one.name) for one in code)
    return {pipe: counts[pipe] for pipe in PIPES if counts[pipe]}
