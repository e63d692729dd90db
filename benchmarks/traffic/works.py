"""A counted case and the pinned table as the `Work` of each launch at the quoted shape: what `verdict` takes."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from benchmarks.kernels_check import pinned
from benchmarks.kernels_check.occupancy import resident_blocks
from benchmarks.shapes import CONTRAST, UPSAMPLED

from . import cases
from .machines import Machine
from .verdict import Verdict, Work, verdict_of

CUDA_TILE = 64  # kTile of contrast_plan.h
WORKSPACE_BYTES = 64 << 20  # partial sums of groups, written and read: they do not grow with the pixels
_GROUPED = ("prototype", "moments", "add_", "total", "finish", "seen", "norms")
_FINISHING = ("add_", "total", "finish", "seen")  # they add up what the blocks left
_TYPES = {"float32": ("fp32", "float"), "half": ("bf16", "__nv_bfloat16")}  # in Triton's rows, in CUDA's


class Problem(NamedTuple):
    """A counted case, and the quoted shape that it stands for."""

    op: str
    shape: str
    dtype: str
    layout: str
    learned: bool

    @classmethod
    def of(cls, name: str) -> Problem:
        op, shape, dtype, layout, *learned = name.split(", ")
        return cls(op, shape, dtype, layout, bool(learned))

    @property
    def is_quoted(self) -> bool:
        """Rows of A are odd where it is quoted, the others' even; channels_last and learned prototypes next to them."""
        quoted = "odd" if self.shape == "A" and not self.learned else "even"
        return self.layout in (quoted, "channels_last")

    @property
    def is_map(self) -> bool:
        return self.shape in CONTRAST

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def counted_pixels(self) -> int:
        grid = cases.GRIDS[self.layout] if self.is_map else cases.UPSAMPLED[self.shape][2]
        return grid[0] * grid[1]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Images, pixels of one, channels (1 of an up-sampled map), classes."""
        if self.is_map:
            batch, dim, height, width, classes = CONTRAST[self.shape]
            return batch, height * width, dim, classes
        (batch, classes, _, _), (height, width) = UPSAMPLED[self.shape]
        return batch, height * width, 1, classes

    @property
    def unit_bytes(self) -> float:
        """S, or U, at full size."""
        batch, pixels, dim, classes = self.sizes
        return batch * pixels * self.itemsize * (dim if self.is_map else classes)

    @property
    def scale(self) -> float:
        batch, pixels, *_ = self.sizes
        return batch * pixels / self.counted_pixels


@functools.cache
def _rows() -> list[dict]:
    return pinned.read()["rows"]


def static_of(kernel: str, by: str, problem: Problem, machine: Machine) -> dict | None:
    """The pinned row of a kernel that was counted."""
    triton, cuda = _TYPES[problem.dtype]
    if by == "cuda":
        names = (kernel, f"{kernel}<{cuda}>", f"{kernel}<{cuda}, false, false>", f"{kernel}<{cuda}, false>")
        return next((r for r in _rows() if r["arch"] == machine.cuda_arch and r["kernel"] in names), None)
    op = {"prototype_contrastive_loss": "contrast", "class_moments": "moments"}.get(problem.op, "upsampled")
    case = f"{op} {problem.shape}" + (" channels_last" if problem.layout == "channels_last" else "")
    found = []
    for row in _rows():
        if (row["by"], row["kernel"], row["arch"]) != ("triton", kernel.removesuffix("_kernel"), machine.triton_arch):
            continue
        first, _, dtype = row["case"].removesuffix(" 2").rpartition(" ")
        if case in (first, *row["also"]):
            found.append(
                (dtype != triton, row)
            )  # some have no features among their operands, and one row for all dtypes
    return min(found, key=lambda pair: pair[0], default=(False, None))[1]


def works(row: dict, phase: str, machine: Machine) -> list[Work]:
    problem = Problem.of(row["case"])
    return [
        _work(k, static_of(k["name"], row["by"], problem, machine), row["by"], problem, machine)
        for k in row[phase]["kernels"]
    ]


def _work(k: dict, static: dict | None, by: str, problem: Problem, machine: Machine) -> Work:
    batch, pixels, dim, classes = problem.sizes
    grouped = any(word in k["name"] for word in _GROUPED)
    threads = k.get("threads") or (32 * static["warps"] if static else 0)
    shared = k.get("shared_bytes") or (static or {}).get("shared_bytes", 0)
    resident = resident_blocks(machine.capability, threads, static["registers"], shared) if static and threads else None
    blocks = None if grouped else _blocks(k, static, by, problem)
    products, softmaxes = _arithmetic(k, static, problem)
    if any(word in k["name"] for word in _FINISHING):
        moved = min(k["distinct"] * problem.unit_bytes, WORKSPACE_BYTES)
        return Work(k["name"], moved, moved, resident_blocks=resident)
    return Work(
        k["name"], _dram_bytes(k, grouped, resident or 2, problem, machine), k["all_sectors"] * problem.unit_bytes,
        k.get("wavefronts_per_block", 0.0) * k["blocks"] * problem.scale, 2 * batch * pixels * dim * classes * products,
        problem.dtype == "half" and "unit" not in k["name"] and not (by == "cuda" and "moments" in k["name"]),
        batch * pixels * classes * softmaxes, _instructions(k, static, problem), blocks, resident, _in_flight(k, static, problem),
    )  # fmt: skip


def is_reused_at_once(k: dict) -> bool:
    """Whether what a block reads again is no farther apart than one tile of pixels is large, however many tiles it walks: kernels that go
    tile by tile, and less than half of the features: sectors that two requests of an odd row share."""
    return k["again"] < 0.5 or any(
        word in k["name"] for word in ("unit_moments", "prototype_kernel", "prototypes_kernel")
    )


def _dram_bytes(k: dict, grouped: bool, resident: int, problem: Problem, machine: Machine) -> float:
    """Each sector once, the second reads of a block too where so many blocks hold more than L2. The prototypes do not grow with pixels."""
    _, _, dim, classes = problem.sizes
    counted_unit = problem.unit_bytes / problem.scale
    prototypes = classes * dim * problem.itemsize / counted_unit if problem.is_map else 0.0
    rest = max(0.0, k["distinct"] - k["compulsory"] - k["gradient"] - prototypes)
    if grouped:
        rest = min(rest, WORKSPACE_BYTES / problem.unit_bytes)
    running = machine.multiprocessors * resident * (k["block_footprint_bytes"] - k["common_bytes"]) + k["common_bytes"]
    again = k["again"] if running > machine.cache_bytes and not is_reused_at_once(k) else 0.0
    return (k["compulsory"] + again + k["gradient"] + rest) * problem.unit_bytes


def _blocks(k: dict, static: dict | None, by: str, problem: Problem) -> float | None:
    """At full size: tiles of pixels, times what a tile is shared out to."""
    if not problem.is_map or "finish" in k["name"]:
        return None
    tile = CUDA_TILE if by == "cuda" else (static or {}).get("blocks", {}).get("N")
    if not tile:
        return None
    batch, pixels, *_ = problem.sizes
    return k["blocks"] / math.ceil(problem.counted_pixels / tile) * batch * math.ceil(pixels / tile)


def _arithmetic(k: dict, static: dict | None, problem: Problem) -> tuple[float, float]:
    """Products of 2 N D K, and softmaxes of N K, from how often the features are read: once per block of classes, and once more where
    the gradient needs them."""
    _, _, dim, classes = problem.sizes
    name, read = k["name"], k["read"]
    if not problem.is_map:
        return 0.0, 1.0 if read else 0.0
    if "norms" in name:
        return 1 / classes, 0.0
    if "moments" in name:
        return ((static or {}).get("blocks", {}).get("K", 2) / classes * problem.itemsize**-1 * 4 if read else 0.0), 0.0
    if not read:
        return 0.0, 0.0
    own = {
        "general_p": 80 if problem.dtype == "float32" else 128,
        "general": 240,
        "prototypes": 80 if problem.dtype == "float32" else 128,
    }
    block = (static or {}).get("blocks", {}).get("K") or next(
        (v for word, v in own.items() if word in name), 20 if problem.dtype == "float32" else 32
    )
    padded, part = math.ceil(classes / block) * block / classes, block / classes
    across = math.ceil(dim / (static or {}).get("blocks", {}).get("O", dim))
    if "prototype" in name and "general" not in name and "contrast_forward" not in name:
        return read * min(part, padded), across * padded
    if "resident" in name:
        return padded * (2 if "backward" in name else 1), padded
    if "forward" in name:
        return max(padded, read * part) if "general" not in name else read * part, padded
    if "split" in name or "general" in name:
        return (read - 1) * part + padded, across * padded
    return read * padded, padded


def _instructions(k: dict, static: dict | None, problem: Problem) -> float:
    """Of warps, at the least: the hot loop as often as its loads need for what a block was counted to read. Not of `unit_moments`, whose
    innermost loop is that over the classes of a tile."""
    if static is None or not static["loop_bytes"] or "threads" in k or "unit" in k["name"]:
        return 0.0
    threads = 32 * static["warps"]
    read = k["read"] if "moments" in k["name"] else k["all"] - k["gradient"]
    trips = read * problem.unit_bytes / problem.scale / k["blocks"] / (threads * static["loop_bytes"])
    return trips * sum(static["loop"].values()) * static["warps"] * k["blocks"] * problem.scale


def _in_flight(k: dict, static: dict | None, problem: Problem) -> float | None:
    """Of a block. CUDA: counted in the emulator. Triton: the stages of the hot loop that are loaded ahead, or the whole tile."""
    if k.get("in_flight_bytes"):
        return k["in_flight_bytes"]
    if static is None or "threads" in k or not k["read"]:
        return None
    if "resident" in k["name"] or "unit" in k["name"]:
        tiles = max(1, math.ceil(problem.counted_pixels / static["blocks"]["N"]))
        return problem.unit_bytes / problem.scale / tiles
    ahead = max(1, static["stages"] - 1) * static["loop_bytes"] * 32 * static["warps"]
    tile = (
        static["blocks"].get("N", 0) * static["blocks"].get("O", 0) * problem.itemsize
    )  # of the second factor, at once
    return max(ahead, tile) or None


def verdicts(row: dict, machine: Machine) -> dict[str, Verdict]:
    """By pass."""
    problem = Problem.of(row["case"])
    found = {}
    for phase, least in (("forward", 1.0), ("backward", 2.0)):
        if phase in row and row[phase]["kernels"] and (problem.is_map or phase == "forward"):
            all_works = works(row, phase, machine)
            bytes_ = least * problem.unit_bytes if problem.is_map else sum(work.dram_bytes for work in all_works)
            found[phase] = verdict_of(all_works, bytes_, machine)
    return found
