"""The kernels of csrc/cuda for the CPU: built once for their sources, kept in build/, loaded by ctypes or as a torch library.

library = build.library("name", ["csrc/cuda/some_op/some.cu", "tests/some_entry.cpp"])
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
BUILT = ROOT / "build" / "cuda_emulator"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = [  # -O2 takes half as long again to compile, and what it makes is no faster
    "-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-fno-gnu-unique", "-fvisibility=hidden", "-DSPCL_EMULATED",
    "-Wall", "-Wno-unknown-pragmas", f"-I{CUDA}", f"-I{ROOT / 'tests' / 'cuda_emulator'}",
]  # fmt: skip
# Every load and store of a kernel's own source becomes a call, which traffic.cpp answers; as wide as the source has it.
COUNTED = (
    "-O2", "-g1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-fno-tree-vectorize", "-fno-tree-slp-vectorize",
    "-fno-tree-sra", "-fno-ipa-sra",  # a float4 is one load of 16 bytes, not four
    "-fno-store-merging", "-fno-tree-loop-distribute-patterns",
)  # fmt: skip
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "random": (2, 1), "another random": (2, 2), "block by block": (3, 0)}


def library(
    name: str,
    sources: Sequence[str],
    replace: Sequence[tuple[str, str, str]] = (),
    flags: Sequence[str] = (),
    counted: bool = False,
) -> Path:
    """The shared library of these sources (paths from the root) and the emulator. Each object is kept for its text and its headers'.

    replace: (file name, old, new) plants a bug: `old` must be there. counted: its loads and stores can be asked for (traffic.cpp).
    """
    assert COMPILER is not None
    BUILT.mkdir(parents=True, exist_ok=True)
    headers = _planted_headers(replace)
    emulator = ["cuda_emulator.cpp", *(["traffic.cpp"] if counted else [])]
    sources = (*(f"tests/cuda_emulator/{file}" for file in emulator), *sources)
    wanted = [
        (source, headers, replace, (*flags, *(COUNTED if counted and source.endswith(".cu") else ())))
        for source in sources
    ]
    for one in wanted:  # what no other process is at first: two of them share out what there is to compile
        _object(*one, waits=False)
    objects = [_object(*one) for one in wanted]
    linking = [f for f in flags if f.startswith(("-l", "-L", "-Wl"))]
    out = BUILT / f"{name}-{digest(*(o.name for o in objects), *flags)}.so"
    with _lock(out):
        if not out.exists():
            _run([COMPILER, "-shared", "-Wl,-Bsymbolic", "-o", out.with_suffix(".tmp"), *objects, *linking])
            out.with_suffix(".tmp").replace(out)
    return out


def _planted_headers(replace) -> Path:
    """The folder whose headers a source opens: csrc/cuda, or a copy of its headers with the bugs where one of them changes."""
    headers = [path for path in CUDA.rglob("*") if path.suffix in (".h", ".cuh")]
    if not {name for name, _, _ in replace} & {path.name for path in headers}:
        return CUDA
    csrc = BUILT / f"planted-{digest(repr(replace))}"
    with _lock(csrc):
        for folder in filter(Path.is_dir, CUDA.iterdir()):  # those without headers too: a source's ../ starts there
            (csrc / "cuda" / folder.name).mkdir(parents=True, exist_ok=True)
        for path in (*headers, *CUDA.parent.glob("*.h")):
            _write(csrc / path.relative_to(CUDA.parent), _planted(path, replace))
    return csrc / "cuda"


def _planted(path: Path, replace) -> str:
    text = path.read_text()
    for name, old, new in replace:
        if name == path.name:
            found = _however_it_is_wrapped(old).search(text)
            assert found, f"{path}: {old!r} is not there; the planted bug must follow the code"
            text = text[: found.start()] + new + text[found.end() :]
    return text


def _however_it_is_wrapped(code: str) -> re.Pattern:
    """Finds the same tokens in whatever lines the formatter lays them."""
    pattern = "".join(rf"\s*{re.escape(token)}" for token in re.findall(r"\w+|[^\w\s]", code))
    return re.compile(pattern.removeprefix(r"\s*"))


def _object(source: str, headers: Path, replace, flags: Sequence[str], waits: bool = True) -> Path:
    path = ROOT / source
    text = _planted(path, replace)
    bound = path.name.startswith("bind")
    own_flags = (
        [f for f in flags if not f.startswith(("-l", "-L", "-Wl"))] if bound else [f for f in flags if f in COUNTED]
    )
    folder = headers / path.parent.relative_to(CUDA) if path.is_relative_to(CUDA) else path.parent
    text_of_headers = [_planted(header, replace) for header in _included(path)]
    out = BUILT / f"{path.stem}-{digest(text, *text_of_headers, *FLAGS, *own_flags, torch.__version__)}.o"
    with _lock(out, waits) as is_ours:
        if is_ours and not out.exists():
            copy = out.with_suffix(".cpp")
            copy.write_text(f'#line 1 "{path}"\n{text}')
            command = [COMPILER, "-x", "c++", "-c", copy, "-o", out.with_suffix(".tmp")]
            _run([*command, f"-I{folder}", f"-I{headers}", *FLAGS, *own_flags])
            out.with_suffix(".tmp").replace(out)
            copy.unlink()
    return out


def _included(path: Path) -> list[Path]:
    """Our own headers that a source opens, however far down."""
    found, left = set(), [path]
    while left:
        opened = left.pop()
        for name in re.findall(r'^#include "([^"]+)"', opened.read_text(), re.MULTILINE):
            for folder in (opened.parent, CUDA, ROOT / "tests" / "cuda_emulator"):
                header = (folder / name).resolve()
                if header.is_file() and header not in found:
                    found.add(header)
                    left.append(header)
    return sorted(found)


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _run(command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr[-6000:]}"


def _write(path: Path, text: str) -> None:
    """At once, as another process may be compiling what it opens."""
    half = path.with_suffix(f".{os.getpid()}")
    half.write_text(text)
    half.replace(path)


@contextlib.contextmanager
def _lock(made: Path, waits: bool = True) -> Iterator[bool]:
    """One process makes it, another one waits for it or, with `waits` False, gets False at once."""
    with open(f"{made}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def load(path: Path) -> ctypes.CDLL:
    """The library by ctypes, with the emulator's own functions declared."""
    handle = ctypes.CDLL(str(path))
    handle.emulator_allocate.restype, handle.emulator_allocate.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t, ctypes.c_size_t],
    )
    handle.emulator_free.argtypes = [ctypes.c_void_p]
    handle.emulator_damage.restype = ctypes.c_char_p
    return handle


@contextlib.contextmanager
def order(handle: ctypes.CDLL, name: str) -> Iterator[None]:
    """Threads and blocks take turns in this order (a key of ORDERS)."""
    handle.emulator_order(*ORDERS[name])
    try:
        yield
    finally:
        handle.emulator_order(*ORDERS["forward"])


class Guarded:
    """Tensors whose memory lies between guards that may not be touched; freed, and checked for writes beyond the end, by close()."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self.handle, self.pointers = handle, []

    def empty(self, *shape: int, dtype=torch.float32, alignment: int = 16) -> torch.Tensor:
        """Full of 0xff: NaN, or -1."""
        count = torch.Size(shape).numel()
        bytes_ = count * torch.empty(0, dtype=dtype).element_size()
        pointer = self.handle.emulator_allocate(bytes_, alignment)
        self.pointers.append(pointer)
        if not count:
            return torch.empty(shape, dtype=dtype)
        memory = (ctypes.c_char * bytes_).from_address(pointer)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)

    def copy(self, tensor: torch.Tensor, alignment: int = 16) -> torch.Tensor:
        """The same values in the same (dense) strides."""
        flat = self.empty(tensor.numel(), dtype=tensor.dtype, alignment=alignment)
        return flat.as_strided(tensor.shape, torch.empty_like(tensor).stride()).copy_(tensor)

    def close(self) -> None:
        for pointer in self.pointers:
            self.handle.emulator_free(pointer)
        self.pointers.clear()
        damage = self.handle.emulator_damage()
        assert damage is None, damage.decode()
