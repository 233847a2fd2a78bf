"""What a worker says: its log and what libraries print, kept in lines until the driver asks."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shards.urls import shown
from trainer.logs import LogLine

# Lines that wait for a driver that does not ask: of more, the oldest go.
_MOST = 10_000


class Lines:
    """Lines of text from any thread, taken by one reader; without passwords."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._lock = threading.Lock()

    def add(self, line: str) -> None:
        with self._lock:
            self._lines.append(shown(line))
            del self._lines[:-_MOST]

    def take(self) -> list[str]:
        """The lines since the last call."""
        with self._lock:
            lines, self._lines = self._lines, []
        return lines


class Printed(io.TextIOBase):
    """A text stream that passes on whole lines."""

    def __init__(self, add: Callable[[str], None]) -> None:
        self._add = add
        self._rest = ""
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            # A progress bar's redrawn line counts as one line each time.
            *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in lines:
            if line.strip():
                self._add(line)
        return len(text)


class _Handler(logging.Handler):
    """A log handler that passes on formatted records."""

    def __init__(self, add: Callable[[str], None]) -> None:
        super().__init__()
        self._add = add
        self.setFormatter(LogLine())

    def emit(self, record: logging.LogRecord) -> None:
        self._add(self.format(record))


@contextmanager
def collected(lines: Lines, logger: logging.Logger, rank: int) -> Iterator[None]:
    """Collect a logger's records, and what is printed, which is marked with the rank. A crash of
    the interpreter itself leaves its last words in Ray's log files only."""
    before = logger.handlers, logger.propagate, sys.stdout, sys.stderr
    logger.handlers, logger.propagate = [_Handler(lines.add)], False
    sys.stdout = sys.stderr = Printed(lambda line: lines.add(f"[worker {rank}] {line}"))
    try:
        yield
    finally:
        logger.handlers, logger.propagate, sys.stdout, sys.stderr = before
