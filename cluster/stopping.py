"""The wish to end: signals, counted; and the time within which it is granted."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from shards.processes import STOP_SIGNALS

# A second signal within these seconds is the first: `timeout` sends it to the process and to its
# group, of which it is.
_SAME_S = 1.0

# Of cluster.stop_timeout_s, what is left for ending the workers and Ray.
_TO_END_S = 5.0


class Stop:
    """Whether a stop has been asked for, and since when."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._asked: float | None = None
        self.ended = threading.Event()

    def take_signals(self) -> None:
        """Handle the signals, in the main thread; again where something else has taken them."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self.handle)

    def asked(self) -> bool:
        return self._asked is not None

    def overdue(self) -> bool:
        """Whether the workers have had their time to save."""
        patience = max(self._timeout - _TO_END_S, self._timeout / 2)
        return self._asked is not None and time.monotonic() - self._asked > patience

    def handle(self, number: int, _frame: object) -> None:
        """The signals' handler, which may interrupt anything, and so does hardly anything. A Ctrl-C
        after the first signal aborts."""
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif number == signal.SIGINT and now - self._asked > _SAME_S:
            raise KeyboardInterrupt

    def watch(self) -> None:
        """In a thread: end this process where nothing else does in time, as when Ray hangs. What it
        leaves behind is ended by the reaper."""
        while self._asked is None or time.monotonic() - self._asked < self._timeout:
            if self.ended.wait(0.5):
                return
        line = (
            "error: the stop took longer than cluster.stop_timeout_s="
            f"{self._timeout:g}; the same command goes on from the last checkpoint\n"
        )
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
        os._exit(75)


@contextlib.contextmanager
def stop_signals(timeout: float) -> Iterator[Stop]:
    """Take signals for the wish to stop. In a thread that is not the main one, none come."""
    stop = Stop(timeout)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    stop.take_signals()
    threading.Thread(target=stop.watch, name="lxscale-stop", daemon=True).start()
    try:
        yield stop
    finally:
        # After a stop, until the process has ended: what is left to do may hang, too.
        if not stop.asked():
            stop.ended.set()
        for s, handler in before.items():
            signal.signal(s, handler)
