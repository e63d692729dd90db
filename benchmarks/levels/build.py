"""Compiles ops.cpp and the kernels of csrc/cpu for one instruction set, with the flags of setup.py, into build/levels."""

from __future__ import annotations

import ast
import concurrent.futures
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT

BUILD = ROOT / "build" / "levels"


class Target(NamedTuple):
    """A program: its name, the instruction set it is compiled as, the compiler, flags after those of setup.py."""

    name: str
    level: str
    compiler: str
    flags: tuple[str, ...] = ()


def setup_list(name: str) -> list[str]:
    """A list of strings that setup.py assigns; the file itself is a command."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(to, "id", None) for to in node.targets] == [name]:
            return ast.literal_eval(node.value)
    raise KeyError(f"setup.py assigns no {name}")


def version(compiler: str) -> str:
    """The first line of --version; SystemExit where the compiler is not there."""
    if shutil.which(compiler) is None:
        raise SystemExit(f"{compiler} was not found. On Debian: apt install g++ (or g++-aarch64-linux-gnu).")
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def sources() -> list[Path]:
    kernels = [path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if not path.name.startswith("bind_")]
    return [*sorted(kernels), Path(__file__).with_name("ops.cpp")]


def built(target: Target) -> Path:
    """The program, made anew where a source is newer."""
    folder = BUILD / target.name
    program, inputs = folder / "ops", [*ROOT.glob("csrc/**/*.h"), *sources(), ROOT / "setup.py", Path(__file__)]
    if program.exists() and program.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return program
    version(target.compiler)
    folder.mkdir(parents=True, exist_ok=True)
    cached = ["ccache"] if shutil.which("ccache") else []
    flags = [*setup_list("KERNEL_FLAGS"), *target.flags, f"-DSPCL_ISA={target.level}", f"-I{ROOT / 'csrc'}"]

    def compiled(source: Path) -> str:
        to = str(folder / f"{source.stem}.o")
        _do([*cached, target.compiler, *flags, "-c", str(source), "-o", to])
        return to

    with concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compiled, sources()))
    _do([target.compiler, "-static", *objects, "-o", str(program)])
    return program


def op_names(program: list[str]) -> list[str]:
    return subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed:\n{done.stdout}{done.stderr}")
