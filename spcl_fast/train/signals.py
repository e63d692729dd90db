"""A stop asked for by a signal becomes a flag that long work reads where its state is whole.

SIGTERM, SIGUSR1 (batch systems' early warning), SIGHUP (a terminal that is closed; not under nohup) and the first SIGINT (Ctrl-C) set
the flag; a second SIGINT interrupts at once, and the loop saves the state before the interrupted step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Interrupted


class StopRequest:
    """Whether somebody asked this process to stop, and with which signal."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._held = False
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def raise_if_requested(self, doing: str) -> None:
        """For long work without a state of its own: Interrupted (exit 75) if a stop was asked for."""
        if self.requested:
            raise Interrupted(f"Stopped by {self.name} while {doing}. Start the same command again to go on.")

    @property
    def name(self) -> str:
        return self.signal.name if self.signal is not None else "another process's signal"

    def _handle(self, number: int, frame: object) -> None:
        # Data-loading processes forked later inherit this handler: a signal to the whole process group must not kill them before the
        # state is saved, so there the flag is set too, and nobody reads it.
        again = number == signal.SIGINT == self.signal
        self.signal = signal.Signals(number)
        if again and not self._held and os.getpid() == self._pid:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it a second Ctrl-C interrupts nothing: a state is being saved."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before


_current: StopRequest | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn stop signals into a flag inside the block. Nested blocks share the outer one's; outside the main thread no signal is caught."""
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or StopRequest()
        return
    request = StopRequest()
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request._handle) for number in numbers}
    _current = request
    try:
        yield request
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
