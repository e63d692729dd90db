"""Both compilers, and the pinned table: `python -m benchmarks.kernels_check [--only WORD] [--seconds S] [--update]`.

Prints a line per kernel; fails on a spill, and with the rows that differ where the compilers made something else than is pinned. `--update`
pins what was found. All of it takes long at first (half an hour of a core); what is compiled is kept in the temporary folder, so that a run
that was stopped by --seconds goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "spcl_fast_kernels_check"))

import triton  # noqa: E402 - it reads its cache's folder when it is imported

from . import cuda_kernels, pinned, triton_kernels  # noqa: E402


def _rows(options: argparse.Namespace) -> Iterator[tuple[dict | None, str, bool]]:
    start = time.monotonic()
    is_late = lambda: time.monotonic() - start > options.seconds  # noqa: E731
    wanted = lambda title: all(word in title for word in options.only)  # noqa: E731
    print(triton_kernels.HEADER)
    for capability in triton_kernels.PINNED:
        yield from triton_kernels.rows(capability, wanted, is_late)
    if cuda_kernels.nvcc() is None:
        print("nvcc was not found: the CUDA kernels were not compiled")
        return
    print(cuda_kernels.HEADER)
    yield from cuda_kernels.rows(wanted, is_late)


def compilers() -> dict[str, str]:
    return {"triton": triton.__version__} | ({} if cuda_kernels.nvcc() is None else {"cuda": cuda_kernels.version()})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels_check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--only", nargs="*", default=[], help="rows with all of these words, such as: triton contrast sm_90"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="what no longer fits is left for the next call"
    )
    parser.add_argument("--update", action="store_true", help="pin what was found")
    options = parser.parse_args(argv)
    if triton_kernels.pixels.INTERPRETED:
        print("kernels-check compiles; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    found, left, wrong = [], 0, 0
    for row, line, is_faulty in _rows(options):
        if row is None:
            left += 1
            continue
        print(line, flush=True)
        found.append(row)
        wrong += is_faulty
    print(f"{wrong} faulty" if wrong else "no spills, shared memory within limits")
    if left:
        print(f"{left} left for the next call")
    return _against_the_table(found, bool(options.only or left), options.update) or int(wrong > 0)


def _against_the_table(found: list[dict], is_part: bool, update: bool) -> int:
    table, here = pinned.read(), compilers()
    complete = set() if is_part else {(row["by"], row["arch"]) for row in found}
    if update:
        pinned.write(table["compilers"] | here, pinned.merged(found, table["rows"], complete))
        print(f"pinned {len(found)} rows in {pinned.TABLE}")
        return 0
    same = {name for name, version in here.items() if table["compilers"].get(name) == version}
    for name in sorted(here.keys() - same):
        print(f"{name} {here[name]} is not what the table was made with ({table['compilers'].get(name)}): not compared")
    kept = [row for row in table["rows"] if row["by"] in same]
    compared = [row for row in found if row["by"] in same]
    lines = pinned.differences(compared, kept, complete)
    print("\n".join(lines) if lines else f"{len(compared)} rows as pinned")
    if lines:
        print(
            f"{len(lines)} rows are not as pinned in {pinned.TABLE}; where that is meant: make kernels-check ARGS=--update"
        )
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
