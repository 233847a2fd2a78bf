"""The driver channel: a small actor through which driver and workers talk.

Workers leave their log lines there and, at the end, the result; the driver leaves the wish to
stop. Nothing else passes between them, and no tensor ever.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import ray

# Seconds between two exchanges of a worker, and between two looks of the driver for lines.
_WORKER_S = 0.5
_DRIVER_S = 0.2


class DriverChannel:
    """The actor; `ray.remote` makes it one."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._stop = False
        self._result: Any = None

    def exchange(self, lines: list[str]) -> bool:
        """Take a worker's new log lines; returns whether it should stop."""
        self._lines += lines
        return self._stop

    def stop(self) -> None:
        """Ask all workers for a clean end."""
        self._stop = True

    def finish(self, result: Any) -> None:
        """Take the result of the run, from rank 0."""
        self._result = result

    def drain(self) -> list[str]:
        """The log lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def result(self) -> Any:
        """The result of the run; None as long as rank 0 has not finished."""
        return self._result


class WorkerChannel:
    """A worker's end of the channel: it collects the log and what is printed, and a thread sends
    it, so that no step waits for the driver."""

    def __init__(self, channel: Any, logger: logging.Logger, rank: int) -> None:
        self._channel = channel
        self._logger = logger
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self._stop = False
        self._closed = threading.Event()
        self._handler = _Lines(self._add)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.handlers = [self._handler]
        logger.propagate = False
        # What libraries print, too. A crash of the interpreter itself leaves its last words in
        # Ray's log files only.
        self._streams = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = Printed(lambda line: self._add(f"[worker {rank}] {line}"))
        self._thread = threading.Thread(target=self._run, name="lxscale-channel", daemon=True)
        self._thread.start()

    def should_stop(self) -> bool:
        return self._stop

    def close(self) -> None:
        """Send what is left."""
        self._closed.set()
        self._thread.join()
        self._exchange()
        self._logger.handlers = []
        sys.stdout, sys.stderr = self._streams

    def _add(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)

    def _run(self) -> None:
        while not self._closed.wait(_WORKER_S):
            self._exchange()

    def _exchange(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, []
        # A driver that is gone takes the channel with it; Ray then ends this worker.
        with contextlib.suppress(ray.exceptions.RayError):
            self._stop = ray.get(self._channel.exchange.remote(lines)) or self._stop


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


class _Lines(logging.Handler):
    """A log handler that passes on formatted records."""

    def __init__(self, add: Callable[[str], None]) -> None:
        super().__init__()
        self._add = add

    def emit(self, record: logging.LogRecord) -> None:
        self._add(self.format(record))


def follow(channel: Any, thread: threading.Thread, stop_asked: Callable[[], bool]) -> None:
    """Print the workers' lines until `thread`, which runs them, ends. Once `stop_asked()` is true,
    ask them to stop."""

    def show() -> None:
        for line in ray.get(channel.drain.remote()):
            print(line, flush=True)

    told = False
    while thread.is_alive():
        if stop_asked() and not told:
            told = True
            channel.stop.remote()
            print("stopping: the workers save a checkpoint; once more to abort", flush=True)
        show()
        thread.join(_DRIVER_S)
    show()
