"""stdout and stderr that a shell has closed, or that nobody reads any more."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import TextIO

from shards.urls import shown


def open_closed_streams() -> None:
    """Open what the shell has closed (`>&-`): else the next file has its number, and what libraries
    print gets into that."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def reader_has_gone() -> bool:
    """Whether stdout is a pipe that nobody reads."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # asks for nothing, so it is told of errors alone
    return bool(poll.poll(0))


def stdout_problem() -> OSError | None:
    """Why stdout cannot be written, if so."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def say(line: str) -> None:
    """A line on stderr, where that can be written; without passwords."""
    try:
        print(shown(line), file=sys.stderr, flush=True)
    except (OSError, ValueError):  # full, its reader gone; closed
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """What is written to a stream goes nowhere, with what its buffer still has: that would fail
    once more at the end of the process, and change its exit status."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
