"""The shards of a data set as one process uses them: verified, mapped, and fetched ahead of use.

What is needed next is known, so threads bring the shards into the node's cache in that order while
batches are made of those that are there. A shard that a batch touches before it has arrived is
waited for, or fetched by who touches it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from shards.cache import BusyError, Room, is_local, local_file, open_shared
from shards.errors import DataError
from shards.store import Retry

log = logging.getLogger("lxscale")

# Ahead of need, a fault is tried again later by itself; who needs the shard has the full deadline.
_AHEAD_RETRY = Retry(deadline=10)
_PAUSE = 0.5  # seconds before a shard that could not be had ahead is tried again


class ShardError(DataError):
    """A shard cannot be had; `shard` is its number."""

    def __init__(self, message: str, shard: int) -> None:
        super().__init__(message)
        self.shard = shard


@dataclass(frozen=True)
class ShardFile:
    """Where a shard's tar is, and what it must be; size in bytes."""

    url: str
    sha256: str
    size: int


class ShardFiles:
    """Mapped tars by shard number. `limit`: bytes of the node's cache, None = no limit."""

    def __init__(self, files: list[ShardFile], cache: Path, limit: int | None = None) -> None:
        self.files, self.cache, self.limit = files, cache, limit
        self._mapped: dict[int, tuple[NDArray[np.uint8], IO[bytes] | None]] = {}
        self._due = np.zeros(len(files))
        self._due_of: dict[str, float] = {f.sha256: 0.0 for f in files}
        self._here: set[int] = set()
        self._tried: dict[int, float] = {}
        self._wanted: list[int] = []
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._open = os.getpid()

    def tar(self, shard: int) -> NDArray[np.uint8]:
        """The bytes of a shard, verified and memory-mapped on first use; ShardError naming it."""
        found = self._mapped.get(shard)
        if found is None:
            try:
                found = self._map(shard)
            except ShardError:
                raise
            except DataError as error:
                raise ShardError(str(error), shard) from error
            self._mapped[shard] = found
        return found[0]

    def _map(self, shard: int) -> tuple[NDArray[np.uint8], IO[bytes] | None]:
        file = self.files[shard]
        while True:
            path = local_file(file.url, file.sha256, file.size, self.cache, room=self._room(0.0))
            if f := open_shared(path):
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
                # Open files protect from eviction; without a limit nothing evicts.
                if self.limit is None:
                    f.close()
                return np.frombuffer(mapped, dtype=np.uint8), None if self.limit is None else f

    def _room(self, before: float, patience: float = 60.0) -> Room | None:
        if self.limit is None:
            return None
        return Room(self.limit, lambda sha: self._due_of.get(sha, np.inf), before, patience)

    # --- ahead ----------------------------------------------------------------------------------

    def look_ahead(self, due: NDArray[np.float64], until: float, threads: int) -> None:
        """Take a new future: `due[i]` says when shard i is needed next, 0 for those in use now, -1
        for those that others may be using still (`shards.sampler.next_use`). Those due before
        `until` are fetched, first things first; unused ones are unmapped."""
        if self._open != os.getpid():  # stopped, or forked: threads do not survive that
            self._threads, self._open = [], os.getpid()
            self._changed = threading.Condition()
        for shard in [s for s in self._mapped if due[s] > 0]:
            _, f = self._mapped.pop(shard)
            if f:
                f.close()
        with self._changed:
            self._due = due
            self._due_of = {}
            for file, when in zip(self.files, due.tolist(), strict=True):
                self._due_of[file.sha256] = min(when, self._due_of.get(file.sha256, np.inf))
            self._tried = {}
            if self.limit is not None:
                self._here = set()  # others may have evicted what was there
            order = np.argsort(due, kind="stable")
            soon = order[(due[order] >= 0) & (due[order] < until)]
            self._wanted = [s for s in soon.tolist() if s not in self._here]
            self._changed.notify_all()
        while len(self._threads) < threads:
            thread = threading.Thread(target=self._work, name="lxscale-fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End the threads; a download under way is finished first."""
        with self._changed:
            self._threads, self._wanted, self._open = [], [], 0
            self._changed.notify_all()

    def _work(self) -> None:
        mine = self._open
        while mine == self._open:
            with self._changed:
                shard = self._next()
                if shard is None:
                    self._changed.wait(_PAUSE if self._wanted else None)
                    continue
                # Nobody else takes it for a while, and it comes back if this fails.
                self._tried[shard] = float("inf")
                due = float(self._due[shard])
            got = False
            try:
                got = self._fetch(shard, due)
            finally:
                with self._changed:
                    self._tried[shard] = time.monotonic()
                    if got:
                        self._here.add(shard)
                        with contextlib.suppress(ValueError):
                            self._wanted.remove(shard)

    def _next(self) -> int | None:
        """The first wanted shard that has not just been tried."""
        now = time.monotonic()
        for shard in self._wanted:
            if self._tried.get(shard, -_PAUSE) + _PAUSE <= now:
                return shard
        return None

    def _fetch(self, shard: int, due: float) -> bool:
        file = self.files[shard]
        if is_local(file.url, file.sha256, file.size, self.cache):
            return True
        room = self._room(due, 0.0)
        try:
            local_file(
                file.url,
                file.sha256,
                file.size,
                self.cache,
                room=room,
                retry=_AHEAD_RETRY,
                wait=False,
            )
        except BusyError:
            return False
        except DataError as error:
            log.warning("not fetched ahead: %s", error)
            return False
        return True


def check_limit(files: ShardFiles, working_set: int) -> None:
    """DataError where the cache cannot hold the shards that are in use at one time (bytes)."""
    if files.limit is not None and files.limit < working_set:
        raise DataError(
            f"the cache limit of {files.limit / 2**30:.3f} GiB is below the working set of "
            f"{working_set / 2**30:.3f} GiB, the shards that steps in flight can need at once: "
            "raise data.cache_limit_gb or lower sampler.window"
        )
