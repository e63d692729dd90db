"""Small modules under other libraries' names, with the part of their API that the package uses.

CI has neither timm nor transformers; the real ones are tested by `make clients` (tests/clients).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

NAMES = ("timm", "transformers")


def take(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on `import timm` and `import transformers` find the stand-ins."""
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on both are not installed."""
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)
