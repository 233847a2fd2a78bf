"""Advisory locks between the processes of a node; the kernel releases those of the dead."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from shards.errors import DataError
from shards.processes import boot_id


class BusyError(DataError):
    """Another process has the file's lock, and the caller does not wait."""


def open_shared(path: Path) -> IO[bytes] | None:
    """The open file, protected from eviction until `unlock`; None where it was evicted already."""
    try:
        f = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    fcntl.flock(f, fcntl.LOCK_SH)
    if os.fstat(f.fileno()).st_nlink:
        return f
    f.close()  # evicted between the two
    return None


def unlock(f: IO[Any]) -> None:
    """Release the lock on an open file; closing does not while a forked process has it open."""
    fcntl.flock(f, fcntl.LOCK_UN)


@contextlib.contextmanager
def locked(folder: Path, name: str, wait: bool = True) -> Iterator[IO[str]]:
    """Hold the lock `name` of a folder. Yields its file, for `note`; BusyError where another
    process holds it and wait is False."""
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / name, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(f"{name} is being fetched by another process") from None
        try:
            yield f
        finally:
            unlock(f)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock that is the file `path`, waiting for it; nothing of it is left afterwards."""
    while True:
        with open(path, "a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            if not _is_at(f, path):
                continue  # its holder has removed it: another process may hold a new one
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                unlock(f)
            return


def _is_at(f: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(f.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def now() -> float:
    """Seconds since the machine started, which no setting of a clock changes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def note(lock: IO[str], began: float, problem: str) -> None:
    """Write a failed try into the lock's file, for processes that wait for the lock."""
    with contextlib.suppress(OSError):  # no space for it: they try for themselves then
        lock.seek(0)
        lock.truncate()
        lock.write(json.dumps([boot_id(), began, problem]))
        lock.flush()


def forget(lock: IO[str]) -> None:
    """Take back what `note` wrote, after a success."""
    with contextlib.suppress(OSError):
        if os.fstat(lock.fileno()).st_size:
            lock.truncate(0)


def failed_since(lock: IO[str], asked: float) -> str | None:
    """What `note` wrote, if that try began after `asked` (as `now` gives it)."""
    lock.seek(0)
    try:
        boot, began, problem = json.loads(lock.read() or "null") or ("", 0.0, "")
        return str(problem) if boot == boot_id() and began >= asked else None
    except (ValueError, TypeError):
        return None
