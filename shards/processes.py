"""Processes that work for another one: they end with it, and leave Ctrl-C to it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """End this process when the one that it works for does, if that is killed, too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="lxscale-parent", daemon=True).start()


@contextlib.contextmanager
def without_sigint() -> Iterator[None]:
    """What is started in the block does not get SIGINT, which a terminal sends to all processes:
    each would print a traceback, from its first moment on. This process gets it after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
