"""How fast a stage goes, and the end of its iterator of batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from .. import distributed
from ..runs.layout import LogLine


class Pace:
    """Images a second and the share of time spent waiting for data since the last line, and the time left."""

    def __init__(self, done: int) -> None:
        self.images = 0
        self.waited = 0.0
        self._since = self._start = time.monotonic()
        self._first = done

    def read(self) -> LogLine:
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        images = sum(distributed.gather_objects(self.images))
        result = LogLine(images_per_s=round(images / elapsed, 3), data_wait=round(min(1.0, self.waited / elapsed), 4))
        self.images, self.waited, self._since = 0, 0.0, now
        return result

    def seconds_left(self, done: int, iterations: int) -> float:
        return (time.monotonic() - self._start) / max(done - self._first, 1) * (iterations - done)


class Closing:
    """`close` for any iterator: generators have one, others need none."""

    def __init__(self, feed: Iterator[Any]) -> None:
        self._feed = feed

    def close(self) -> None:
        close = getattr(self._feed, "close", None)
        if close is not None:
            close()
