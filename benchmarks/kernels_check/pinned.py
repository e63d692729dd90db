"""The pinned table, benchmarks/results/kernels.json: what the compilers made of every kernel, a row per line, so that a change shows.

A row: compiler (`by`), kernel, case (what was launched; of several that compile to the same, the first), arch; warps and shared memory of a
block, registers, spills and stack, blocks that a multiprocessor holds; instructions by pipe of the whole kernel and per trip of its hot
loop, with the bytes that a thread asks of global memory in that trip. Compared only with the compiler that made it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from benchmarks import RESULTS

TABLE = RESULTS / "kernels.json"
Row = dict
_KEY = ("by", "kernel", "case", "arch")


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in _KEY)


def read(path: Path | None = None) -> dict:
    """compilers: name -> version; rows."""
    path = path or TABLE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"compilers": {}, "rows": []}


def write(compilers: dict[str, str], rows: Iterable[Row], path: Path | None = None) -> None:
    lines = ",\n".join(json.dumps(row) for row in sorted(rows, key=key))
    (path or TABLE).write_text(
        f'{{"rung": "static", "compilers": {json.dumps(compilers, sort_keys=True)}, "rows": [\n{lines}\n]}}\n',
        encoding="utf-8",
    )


def merged(found: list[Row], kept: list[Row], complete: Collection[tuple[str, str]] = ()) -> list[Row]:
    """The table with these rows anew. complete: (by, arch) of which everything was compiled: rows that were not found are dropped."""
    new = {key(row): row for row in found}
    return [*new.values(), *(r for r in kept if key(r) not in new and (r["by"], r["arch"]) not in complete)]


def differences(found: list[Row], kept: list[Row], complete: Collection[tuple[str, str]] = ()) -> list[str]:
    """A line for each row that is new, gone, or not as pinned, with what changed."""
    old, new = {key(row): row for row in kept}, {key(row): row for row in found}
    lines = []
    for name, row in new.items():
        title = " ".join(name)
        if name not in old:
            lines.append(f"+ {title}: not pinned")
        elif changed := _changes(old[name], row):
            lines.append(f"~ {title}: {', '.join(changed)}")
    lines += [f"- {' '.join(n)}: pinned, no longer there" for n in old if n not in new and (n[0], n[3]) in complete]
    return lines


def _changes(old: Row, new: Row) -> list[str]:
    found = []
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if before == after or name == "also":
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += [
                f"{name} {pipe} {before.get(pipe, 0)} -> {after.get(pipe, 0)}"
                for pipe in {**before, **after}
                if before.get(pipe) != after.get(pipe)
            ]
        else:
            found.append(f"{name} {before} -> {after}")
    return found
