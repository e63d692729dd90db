"""Which GPU backend is the faster one, for the package to read: `python -m benchmarks.gpu.choice results/<gpu>.json`.

Writes the GPU's part of spcl_fast/backends/measured.json; `make gpu` ends with it. A choice is made for each op, kind of float and size
class (`backends.measured.size_class`) that both backends were timed in; the rest is left out. What is compared is the time of forward and
backward together, since the backward takes what the forward saved: what a call costs its caller (`wall_us`) plus what it costs the GPU
(`graph_us`), as nobody knows here whether the launches of a net hide behind its kernels; summed over the shapes of the class.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import GPU_BACKENDS
from benchmarks.gpu.where import backend_of, named
from spcl_fast.backends import measured

OPS = {  # a timed row's name -> the op it decides
    "contrast forward + backward": "prototype_contrastive_loss",
    "class_moments": "class_moments",
    "upsampled_cross_entropy with gradient": "upsampled_cross_entropy",
    "upsampled_prediction": "upsampled_prediction",
}
# Parts that must be right before a speed counts, and parts that must not be wrong where they were run.
REQUIRED = tuple(named("correct", backend) for backend in GPU_BACKENDS)
CHECKS = (
    *REQUIRED,
    *(named(part, backend) for part in ("graph", "determinism", "big", "sanitizer") for backend in GPU_BACKENDS),
)
_NOISE = 0.97  # the two were timed minutes apart, with other clocks: less of a gain than this is none, however small the spread
Time = tuple[float, float, float]  # microseconds: median, 20th and 80th percentile


def pairs(parts: dict) -> Iterator[tuple[dict, dict]]:
    """The rows of Triton and of CUDA that timed the same."""
    for name in (n for n in parts if backend_of(n) != GPU_BACKENDS[0]):
        triton = {_which(row): row for row in _timed(parts.get(name.removesuffix(f"_{backend_of(name)}"), {}))}
        for row in _timed(parts[name]):
            if _which(row) in triton:
                yield triton[_which(row)], row


def _timed(part: dict) -> list[dict]:
    return [row for row in part.get("rows", []) if isinstance(row, dict) and "us" in row and "shape" in row]


def _which(row: dict) -> tuple:
    return row["op"], row["shape"], row["dtype"]


def next_to_triton(parts: dict) -> list[dict]:
    """Of each row that both backends have: how many times faster the CUDA kernels are."""
    table = []
    for triton, cuda in pairs(parts):
        ratio = {
            way: round(triton[way] / cuda[way], 2)
            for way in ("us", "graph_us", "wall_us")
            if triton.get(way) and cuda.get(way)
        }
        table.append({"op": cuda["op"], "shape": cuda["shape"], "dtype": cuda["dtype"], "times_faster": ratio})
    return table


def choices(parts: dict) -> list[dict]:
    """Rows of the table: one for each op, kind and size class that both backends were timed in."""
    classes: dict[tuple, list[tuple[dict, dict]]] = {}
    for triton, cuda in pairs(parts):
        if cuda["op"] in OPS:
            sizes = cuda["sizes"]
            size = measured.size_class(
                num_classes=sizes["num_classes"], dim=sizes["dim"], small=measured.is_small(sizes["values"])
            )
            kind = measured.KINDS[getattr(torch, cuda["dtype"])]
            classes.setdefault((OPS[cuda["op"]], kind, size), []).append((triton, cuda))
    return [_choice(*key, timed) for key, timed in sorted(classes.items())]


def _choice(op: str, kind: str, size: str, timed: list[tuple[dict, dict]]) -> dict:
    triton, cuda = (_total(rows) for rows in zip(*timed, strict=True))
    usual, other = GPU_BACKENDS
    order = [other, usual] if _clearly_faster(cuda, triton) else [usual, other]
    us = {usual: round(triton[0], 1), other: round(cuda[0], 1)}
    return {
        "op": op,
        "kind": kind,
        "size": size,
        "order": order,
        "us": us,
        "shapes": [row["shape"] for _, row in timed],
    }


def _total(rows: tuple[dict, ...]) -> Time:
    """Caller's and GPU's time, over the rows."""
    ways = [(row, way) for row in rows for way in ("wall_us", "us" if row["graph_us"] is None else "graph_us")]
    return tuple(map(sum, zip(*((row[way], *row["spread"][way]) for row, way in ways), strict=True)))


def _clearly_faster(new: Time, old: Time) -> bool:
    """By more than the noise, and the slow end of the one before the fast end of the other."""
    return new[0] < _NOISE * old[0] and new[2] < old[1]


def why_no_table(results: dict) -> str | None:
    """None, or why no choice can be made from these results."""
    states = {name: part.get("state") for name, part in results["parts"].items()}
    failed = [name for name in CHECKS if states.get(name) == "failed"]
    if failed:
        return f"{', '.join(failed)} failed: no speed is looked at before the answers are right"
    unchecked = [name for name in REQUIRED if states.get(name) != "ok"]
    if unchecked:
        return f"{', '.join(unchecked)} did not run"
    return None if choices(results["parts"]) else "nothing was timed on both backends"


def write(results: dict, path: Path = measured.PATH) -> str:
    """Put the choices of one GPU into the table; other architectures' stay. -> what was done, as text."""
    reason = why_no_table(results)
    if reason:
        return f"the choice of backends stays as it is: {reason}"
    machine, rows = results["machine"], choices(results["parts"])
    arch = "sm_" + machine["capability"].replace(".", "")
    table = _other_architectures(path)
    table[arch] = {"gpu": machine["gpu"], "date": results["date"], "sources": results["sources"], "rows": rows}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
    won = sum(row["order"][0] == "cuda" for row in rows)
    return f"wrote {path}: on {arch} ({machine['gpu']}) cuda is taken in {won} of {len(rows)} classes of problems that were timed on both"


def _other_architectures(path: Path) -> dict:
    """What the table has; a file that is broken is written anew."""
    _, trouble = measured.read_table(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() and not trouble else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="what `make gpu` wrote: results/<gpu>.json")
    results = json.loads(parser.parse_args(argv).result.read_text(encoding="utf-8"))
    reason = why_no_table(results)
    print(reason or write(results))
    return int(reason is not None)


if __name__ == "__main__":
    sys.exit(main())
