"""Which layer of a net a parameter belongs to, by its name: for learning rates that differ by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence

# up to the first number of a name, and on as long as numbers of blocks follow: stages.2.blocks.1, layer1.0, encoder.layer.3
_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?:\.\d+|\.(?:blocks|block|layers|layer)\.\d+)*(?=\.)")


def layer_name(name: str) -> str | None:
    """The numbered layer that a parameter belongs to; None for what stands before or after those (a stem, a last norm)."""
    found = _LAYER.match(name)
    return found and found[0]


def registration_order(names: Sequence[str]) -> dict[str, int]:
    """Names of parameters, in the order in which a net registers them -> the layer of each.

    The stem is layer 0, the first numbered layer is 1, and a last norm belongs to the last layer.
    """
    known: dict[str, int] = {}
    depths: dict[str, int] = {}
    for name in names:
        layer = layer_name(name)
        if layer is not None and layer not in known:
            known[layer] = len(known) + 1
        depths[name] = len(known) if layer is None else known[layer]
    return depths
