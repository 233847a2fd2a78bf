"""The log of a command and of its workers."""

from __future__ import annotations

import logging
import sys

from shards.urls import shown

log = logging.getLogger("lxscale")


class LogLine(logging.Formatter):
    """A record as time and message, in which no URL shows a password."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def setup_logging(rank: int = 0) -> None:
    """The project's log on stdout: time, message; only errors from ranks other than 0."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(LogLine())
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
