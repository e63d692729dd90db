"""docs/losses.md: every block runs as it stands, one after the other, as a newcomer would paste them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "losses.md"


def test_every_block_of_the_page_runs_and_gives_a_finite_loss():
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 10
    for block in blocks:
        names.pop("loss", None)
        exec(compile(block, str(PAGE), "exec"), names)
        if "loss" in names:
            assert names["loss"].dim() == 0 and names["loss"].isfinite(), block
