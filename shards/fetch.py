"""The shards of a data set as one process uses them: verified, mapped, and fetched ahead of use.

What is needed next is known, so threads bring the shards into the node's cache in that order while
batches are made of those that are there. A shard that a batch touches before it has arrived is
waited for, or fetched by who touches it.

Under a byte limit, what is fetched for the windows in use and the next ones displaces what is due
last, and what is fetched for later ones only fills free room. So each shard is downloaded as often
as under the best possible choice (Belady's), and no more: displacing for later windows, too, would
throw away what the current window leaves, and cost about as much as forgetting the oldest first.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from shards import store
from shards.cache import BusyError, FullError, Room, is_local, local_file, open_shared, shrink
from shards.errors import DataError

log = logging.getLogger("lxscale")

_PAUSE = 0.5  # seconds before a shard that could not be had ahead is tried again
_LONGEST_PAUSE = 60.0  # it doubles at every fault of the same shard


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

    @property
    def remote(self) -> bool:
        return store.local_path(self.url) is None


@dataclass(frozen=True)
class Outlook:
    """What comes, by shard number; time is counted in pairs of the run.

    due: time until the shard is needed, 0 while it is in use, -1 while only processes of this run
        that are behind may use it
    mine: whether this process uses it now; soon: whether one of the next windows has it
    until: time left to the end of the run
    """

    due: NDArray[np.float64]
    mine: NDArray[np.bool_]
    soon: NDArray[np.bool_]
    until: float


class ShardFiles:
    """Mapped tars by shard number. `limit`: bytes of the node's cache, None = no limit."""

    def __init__(self, files: list[ShardFile], cache: Path, limit: int | None = None) -> None:
        self.files, self.cache, self.limit = files, cache, limit
        self._mapped: dict[int, tuple[NDArray[np.uint8], IO[bytes] | None]] = {}
        self._due_of: dict[str, float] = {f.sha256: 0.0 for f in files}
        self._ahead: _Ahead | None = None

    def tar(self, shard: int) -> NDArray[np.uint8]:
        """The bytes of a shard, verified and memory-mapped on first use; ShardError naming it."""
        found = self._mapped.get(shard)
        if found is None:
            try:
                found = self._map(shard)
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
                # Open files protect from eviction; those that nothing evicts may close.
                keep = self.limit is not None and file.remote
                if not keep:
                    f.close()
                return np.frombuffer(mapped, dtype=np.uint8), f if keep else None

    def _unmap(self, shards: list[int]) -> None:
        for shard in shards:
            _, f = self._mapped.pop(shard)
            if f:
                f.close()

    def _room(self, after: float) -> Room | None:
        if self.limit is None:
            return None
        return Room(self.limit, lambda sha: self._due_of.get(sha, np.inf), after)

    # --- ahead ----------------------------------------------------------------------------------

    def look_ahead(self, outlook: Outlook, threads: int) -> None:
        """Take a new future. Shards needed before its end are fetched by so many threads, first
        things first; those that this process does not use now are unmapped."""
        self._unmap([shard for shard in self._mapped if not outlook.mine[shard]])
        due_of: dict[str, float] = {}
        for file, when in zip(self.files, outlook.due.tolist(), strict=True):
            due_of[file.sha256] = min(when, due_of.get(file.sha256, np.inf))
        self._due_of = due_of
        if threads == 0:
            return
        if self._ahead is None or self._ahead.process != os.getpid():  # threads survive no fork
            if room := self._room(0.0):
                shrink(self.cache, room)
            self._ahead = _Ahead(self._fetch, threads)
        order = np.argsort(outlook.due, kind="stable")
        due = outlook.due[order]
        wanted = order[(due >= 0) & (due < outlook.until)]
        self._ahead.want(
            [
                (shard, due if soon or due == 0 else np.inf)
                for shard, due, soon in zip(
                    wanted.tolist(),
                    outlook.due[wanted].tolist(),
                    outlook.soon[wanted].tolist(),
                    strict=True,
                )
            ]
        )

    def stop(self) -> None:
        """Let go of everything. The threads end; a download under way is finished first."""
        self._unmap(list(self._mapped))
        if self._ahead:
            self._ahead.stop()
            self._ahead = None

    def _fetch(self, shard: int, after: float) -> None:
        """Bring a shard into the cache, displacing only what is due later than `after`."""
        file = self.files[shard]
        if not is_local(file.url, file.sha256, file.size, self.cache):
            local_file(
                file.url,
                file.sha256,
                file.size,
                self.cache,
                room=self._room(after),
                wait=False,
            )


class _Ahead:
    """Threads that bring shards, first things first, until they are told to stop."""

    def __init__(self, fetch: Callable[[int, float], None], threads: int) -> None:
        self.process = os.getpid()
        self._fetch = fetch
        self._changed = threading.Condition()
        self._wanted: list[tuple[int, float]] = []
        self._done: set[int] = set()  # or under way
        self._not_before: dict[int, float] = {}
        self._full_until = 0.0
        self._faults: dict[int, int] = {}
        self._stopped = False
        for _ in range(threads):
            threading.Thread(target=self._work, name="lxscale-fetch", daemon=True).start()

    def want(self, shards: list[tuple[int, float]]) -> None:
        """(shard, what may be displaced for it), in the order of need."""
        with self._changed:
            self._wanted, self._done, self._full_until = shards, set(), 0.0
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (task := self._take()) is None:
                    self._changed.wait(_PAUSE if len(self._done) < len(self._wanted) else None)
                if self._stopped:
                    return
                assert task
                shard, wanted = task[0], self._wanted
            problem: Exception | None = None
            try:
                self._fetch(*task)
            except Exception as error:
                problem = error
            with self._changed:
                if problem and wanted is self._wanted:
                    self._done.discard(shard)
                self._settle(shard, problem)

    def _take(self) -> tuple[int, float] | None:
        now = time.monotonic()
        if now < self._full_until:
            return None
        for task in self._wanted:
            if task[0] not in self._done and self._not_before.get(task[0], 0.0) <= now:
                self._done.add(task[0])
                return task
        return None

    def _settle(self, shard: int, problem: Exception | None) -> None:
        pause = _PAUSE
        if isinstance(problem, FullError):
            # Room comes when files fall out of use; what is due later does not get it first.
            self._full_until = time.monotonic() + pause
        elif problem is None:
            self._faults.pop(shard, None)
        elif not isinstance(problem, BusyError):
            faults = self._faults[shard] = self._faults.get(shard, 0) + 1
            if faults == 1:
                log.warning("not fetched ahead, tried again later: %s", problem)
            pause = min(_PAUSE * 2**faults, _LONGEST_PAUSE)
        if problem:
            self._not_before[shard] = time.monotonic() + pause


def check_limit(files: ShardFiles, working_set: int) -> None:
    """DataError where the cache cannot hold the shards that are in use at one time (bytes)."""
    if files.limit is not None and files.limit < working_set:
        raise DataError(
            f"the cache limit of {_size(files.limit)} is below the working set of "
            f"{_size(working_set)}, the shards that steps in flight can need at once: raise "
            f"data.cache_limit_gb to {working_set / 2**30:.3g} or more, or lower sampler.window"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.3f} GiB ({count:,} bytes)"
