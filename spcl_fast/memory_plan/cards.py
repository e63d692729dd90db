"""GPUs by the names that people use: how much memory they have, and whether bfloat16. From NVIDIA's data sheets."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from ..errors import ConfigError

RESERVE_GIB = 1.0  # for the CUDA context, cuDNN's workspace and the allocator's gaps, which are not counted
BF16_SINCE = 8.0  # compute capability: Ampere; older cards only emulate bfloat16


class Card(NamedTuple):
    name: str
    memory_gib: float
    capability: float

    @property
    def bf16(self) -> bool:
        return self.capability >= BF16_SINCE

    @property
    def usable_bytes(self) -> int:
        return int((self.memory_gib - RESERVE_GIB) * 2**30)


CARDS = (
    Card("gtx1080ti", 11, 6.1), Card("p100", 16, 6.0), Card("titanv", 12, 7.0), Card("v100", 16, 7.0), Card("v100-32", 32, 7.0),
    Card("t4", 16, 7.5), Card("rtx2070", 8, 7.5), Card("rtx2080", 8, 7.5), Card("rtx2080ti", 11, 7.5), Card("titanrtx", 24, 7.5),
    Card("rtx3060", 12, 8.6), Card("rtx3070", 8, 8.6), Card("rtx3080", 10, 8.6), Card("rtx3090", 24, 8.6), Card("a10", 24, 8.6),
    Card("a40", 48, 8.6), Card("a6000", 48, 8.6), Card("a100", 40, 8.0), Card("a100-80", 80, 8.0), Card("rtx4070", 12, 8.9),
    Card("rtx4080", 16, 8.9), Card("rtx4090", 24, 8.9), Card("l4", 24, 8.9), Card("l40s", 48, 8.9), Card("h100", 80, 9.0),
    Card("h200", 141, 9.0), Card("b200", 180, 10.0), Card("rtx5090", 32, 12.0),
)  # fmt: skip


def card(name: str) -> Card:
    """The card of that name, spelt with any capitals, spaces or hyphens. Raises ConfigError that lists the names."""
    plain = name.lower().replace(" ", "").replace("geforce", "").replace("nvidia", "")
    for known in CARDS:
        if plain in (known.name, known.name.removeprefix("rtx").removeprefix("gtx")):
            return known
    near = difflib.get_close_matches(plain, [known.name for known in CARDS], n=1)
    raise ConfigError(
        f"--gpu {name}: not in the table{f'; did you mean {near[0]}?' if near else ''} It has "
        f"{', '.join(known.name for known in CARDS)}. For another card give --fit SIZE, and --no-bf16 where it is older than Ampere."
    )
