"""Processes that work for another one: they end with it, leave Ctrl-C to it, and leave no files."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import process, resource_tracker, util
from multiprocessing.connection import wait
from pathlib import Path

from shards.store.folders import owned_folder, sweep

_HOME = "lxscale-mp-"
# Where Linux has semaphores, as files `sem.…`: homes are beside them, so that all who see the one
# see the other. It is short, too: a socket's whole path may have 107 bytes.
_PLACE = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())


@functools.cache
def boot_id() -> str:
    """A name of this start of the machine; every start has another. OSError where there is none."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def end_with_parent() -> None:
    """End this process when the one that it works for does, if that is killed, too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="lxscale-parent", daemon=True).start()


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""By which people, `timeout` and schedulers ask for an end, often of all processes at once: the
first one answers for the others."""


@contextlib.contextmanager
def without_signals(*numbers: signal.Signals) -> Iterator[None]:
    """Processes and threads that are started in the block do not get these signals. This thread
    gets them after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def make_home() -> None:
    """Have multiprocessing keep the sockets and semaphores of this process, and of those that it
    starts, where they are swept once this one is dead. They have random names otherwise, and stay
    when it is killed."""
    sweep_homes()
    home = contextlib.ExitStack()
    folder = home.enter_context(owned_folder(_PLACE, _HOME))
    settings = vars(process.current_process())["_config"]
    settings |= {"tempdir": str(folder), "semprefix": f"/{folder.name}"}
    util.Finalize(None, home.close, exitpriority=-100)  # when multiprocessing has removed the rest
    # Where it starts later, it unblocks signals that others have blocked.
    with without_signals():
        resource_tracker.ensure_running()


def sweep_homes() -> None:
    """Remove what dead processes have left in their homes."""
    sweep(_PLACE, _HOME)
    for semaphore in _PLACE.glob(f"sem.{_HOME}*"):
        if not (_PLACE / semaphore.name.removeprefix("sem.").rpartition("-")[0]).exists():
            with contextlib.suppress(OSError):  # another user's, or just removed
                semaphore.unlink()
