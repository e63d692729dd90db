"""Today's pinned rows next to those of fece1ad, the last commit whose kernels had no options: which take more, and why.

results/kernels_fece1ad.json: that commit's kernels under today's names and cases, by the compilers of today's table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks import RESULTS
from benchmarks.tables import markdown

from . import pinned

TABLE = RESULTS / "kernels_fece1ad.json"
Key = tuple[str, str, str, str]  # by, kernel, case, arch


class Pair(NamedTuple):
    key: Key
    before: dict
    after: dict

    @property
    def takes_more(self) -> bool:
        """Of what a multiprocessor has; its resident warps, since a block of twice the warps may do the work of two."""
        more = any(self.after[name] > self.before[name] for name in self.before if name in _COSTS)
        return more or resident_warps(self.after) < resident_warps(self.before)


_COSTS = ("registers", "shared_bytes", "static_shared_bytes", "stack_bytes", "spill_bytes")


def resident_warps(row: dict) -> int:
    return row["resident_blocks"] * row["warps"]


def _by_case(rows: Iterable[dict]) -> dict[Key, dict]:
    """A row for each case that launches it; of a kernel that a case launches twice, the one with more registers."""
    found: dict[Key, dict] = {}
    for row in rows:
        for case in _cases(row):
            key = (row["by"], row["kernel"], case, row["arch"])
            found[key] = max(found.get(key, row), row, key=lambda r: r["registers"])
    return found


def _cases(row: dict) -> list[str]:
    """Triton's are "contrast A fp32", " 2" for the second launch of a case; those without a type are of kernels that fece1ad had not."""
    if row["by"] == "cuda":
        return [row["case"]]
    match = re.fullmatch(r"(.*) ([a-z]+\d+)(?: \d+)?", row["case"])
    return [f"{name} {match[2]}" for name in (match[1], *row["also"])] if match else []


def pairs() -> list[Pair]:
    before, after = (_by_case(pinned.read(path)["rows"]) for path in (TABLE, pinned.TABLE))
    return [Pair(key, before[key], after[key]) for key in sorted(before.keys() & after.keys())]


_STRUCTS = "what the compiler makes of operands in structs: the plain path has nothing more to do"
# (by, beginning of the kernel's name, why it takes more than at fece1ad where it does); the first that fits
REASONS: tuple[tuple[str, str, str], ...] = (
    (
        "triton",
        "prototype",
        "larger blocks, which read the features less often (4 instead of 66 S at C in float32): a block of 16 warps has the sums that "
        "two blocks of 8 had, in more shared memory; at B in half floats 16 warps would spill 8 bytes",
    ),
    (
        "triton",
        "backward_split",
        "larger blocks of output channels: fewer registers, more shared memory, of which there is enough",
    ),
    (
        "triton",
        "forward_resident",
        "128 pixels per block: the prototypes, most of what is read with many classes, are asked for half as often",
    ),
    ("triton", "forward", f"C saves its logits now, so that the backward does not form them again; A: {_STRUCTS}"),
    ("triton", "backward_tile", _STRUCTS),
    ("triton", "moments", _STRUCTS),
    (
        "triton",
        "upsampled_loss",
        "a pixel's bound and the logarithm of its sum are held apart, since their sum loses the probabilities at a low temperature; "
        "labels of -inf have an infinite loss. One warp per block: 8 are resident with up to 255 registers",
    ),
    (
        "triton",
        "prediction",
        "a NaN logit is the largest, as in argmax. One warp per block: 12 are resident, as they were",
    ),
    ("cuda", "contrast_add_groups", "adds the gradients of the bias and of each image, too: an offset more"),
    (
        "cuda",
        "contrast_",
        "shared memory is met without bank conflicts, and channels_last has copy loops of its own (the table above)",
    ),
    ("cuda", "moments", "shared memory is met without bank conflicts (the table above)"),
    (
        "cuda",
        "cross_entropy",
        "classes may be masked by -inf, low temperatures lose no digits; two blocks have 128 registers each",
    ),
    (
        "cuda",
        "prediction",
        "logits of -inf are raised before they are interpolated; two blocks have 128 registers each",
    ),
)


def reason_of(pair: Pair) -> str | None:
    by, kernel, _, _ = pair.key
    return next((why for its, beginning, why in REASONS if its == by and kernel.startswith(beginning)), None)


def _figures(pair: Pair) -> list[str]:
    shared = "static_shared_bytes" if pair.key[0] == "cuda" else "shared_bytes"
    return [
        f"{value(pair.before)} → {value(pair.after)}"
        for value in (
            lambda row: row["registers"],
            lambda row: row[shared],
            lambda row: f"{row['resident_blocks']} x {row['warps']}",
        )
    ]


def section() -> str:
    """Of docs/gpu-evidence.md: every row that takes more, with its reason."""
    every = pairs()
    more = [pair for pair in every if pair.takes_more]
    letters = {why: chr(ord("a") + index) for index, why in enumerate(dict.fromkeys(why for *_, why in REASONS))}
    merged: dict[tuple[str, ...], list[str]] = {}
    for pair in more:
        by, kernel, case, arch = pair.key
        name, _, types = kernel.partition("<")
        row = (by, f"`{name}`", arch, *_figures(pair), letters.get(reason_of(pair) or "", ""))
        merged.setdefault(row, []).append(types.rstrip(">") if types else case)
    rows = [[by, name, "; ".join(cases), *rest] for (by, name, *rest), cases in merged.items()]
    header = ["by", "kernel", "case or types", "arch", "registers", "shared bytes", "resident blocks x warps", "why"]
    fewer = sum(resident_warps(pair.after) < resident_warps(pair.before) for pair in every)
    return f"""### Registers, shared memory and resident warps next to `fece1ad`

Of the {len(every)} kernels and cases of `benchmarks/results/kernels.json` that `fece1ad` had too (`kernels_fece1ad.json`; the last
commit whose kernels had no options), {fewer} have fewer resident warps, and none spills. {len(more)} take more registers or shared memory:

{markdown(header, rows, numbers=False)}

{chr(10).join(f"* {letter}: {why}." for why, letter in letters.items())}
"""
