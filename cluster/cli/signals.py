"""How SIGINT and SIGTERM end the process: with one line and its status, whatever it is doing."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from cluster.cli.streams import say

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A second signal within these seconds is the first: `timeout` sends it to the process and to its
# group, of which it is.
_SAME_S = 1.0


class Signals:
    """While a command works, the first signal raises KeyboardInterrupt in it, so that it cleans up.
    The second one, and any before and after the work, ends the process at once: libraries that are
    being imported and an interpreter that ends print tracebacks of exceptions, or swallow them."""

    def __init__(self, own_process: bool) -> None:
        """own_process: handle the signals of this process, for good; else they are the caller's."""
        self._number, self._when = 0, 0.0
        """The first signal that came, and when."""
        self._status: int | None = None
        """Of the end that was told."""
        self._working = self._said = False
        self._own = own_process
        if not own_process:
            return
        self._take()
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._in_a_finalizer
        # First in, last out: what the interpreter then still does is short, and knows no handlers.
        atexit.register(_handle_by, signal.SIG_IGN)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While a command works. Whatever comes out of it after a signal is a KeyboardInterrupt."""
        self._working = True
        try:
            yield
        except BaseException:
            if self._number:
                raise KeyboardInterrupt from None
            raise
        finally:
            self._working = False
            if self._own:
                self._take()  # Ray has put handlers of its own there

    def tell(self, line: str, status: int) -> int:
        """Say how the command has ended: a signal changes that no more. Returns the status."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
        try:
            say(line)
            self._status = status
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return status

    def aborted(self) -> int:
        """Say so, once; the exit status."""
        if not self._said:
            self._said = True
            with contextlib.suppress(OSError):  # full, closed, or its reader gone
                os.write(2, b"aborted\n")
        return 128 + (self._number or signal.SIGINT)

    def _take(self) -> None:
        _handle_by(self._came)

    def _came(self, number: int, _frame: FrameType | None) -> None:
        if not self._number:
            self._number, self._when = number, time.monotonic()
            if self._working:
                raise KeyboardInterrupt
        elif time.monotonic() - self._when < _SAME_S:
            return
        os._exit(self.aborted() if self._status is None else self._status)

    def _in_a_finalizer(self, unraisable: Any) -> None:
        """Python prints and drops what is raised in a finalizer: raise a KeyboardInterrupt anew."""
        if self._number and issubclass(unraisable.exc_type, KeyboardInterrupt):
            number, self._number = self._number, 0
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        else:
            self._unraisable(unraisable)


def _handle_by(handler: Any) -> None:
    for number in _NUMBERS:
        # Ignored from the start: by nohup, or as a shell's job in the background.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
