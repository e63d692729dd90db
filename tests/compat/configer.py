"""What the nets of openseg-like projects call a configer: nested settings by a path of keys."""

from __future__ import annotations

from typing import Any


class Configer:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def get(self, *path: str) -> Any:
        found: Any = self.settings
        for key in path:
            found = found[key]
        return found

    def exists(self, *path: str) -> bool:
        found: Any = self.settings
        for key in path:
            if key not in found:
                return False
            found = found[key]
        return True
