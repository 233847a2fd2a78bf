"""The shards of a data set as one process uses them: verified, mapped, and fetched ahead of use.

What is needed next is known, so threads bring the shards into the node's cache in that order while
batches are made of those that are there. A batch that needs a shard before it has arrived waits for
the process that fetches it, or fetches it itself.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.store.cache import CacheBudget, FullError, is_local, local_file, shrink
from shards.store.locks import BusyError, open_shared, unlock
from shards.store.stored import StoredFiles

log = logging.getLogger("lxscale")

_PAUSE = 0.5  # seconds before a shard that could not be had ahead is tried again
_LONGEST_PAUSE = 60.0  # it doubles at every fault of the same shard


class ShardError(DataError):
    """A shard cannot be had; `shard` is its number."""

    def __init__(self, message: str, shard: int) -> None:
        super().__init__(message)
        self.shard = shard


class LookAhead(Protocol):
    """What comes (shards/order/lookahead.py); time is counted in pairs of the run."""

    def now(self) -> NDArray[np.int64]:
        """The shards that this process uses, rising."""

    def due(self, shards: NDArray[np.int64]) -> NDArray[np.float64]:
        """When each shard is needed next; -1 where it is in use, infinity where it is not."""

    def upcoming(self) -> Iterator[tuple[int, float, bool]]:
        """(shard, when, whether a stream is in its window or enters it next) in the order of need;
        0 for those in use."""


class ShardFiles:
    """Mapped tars by shard number.

    files: where each shard's tar is; cache: folder of the node's cache; limit: its bytes, None for
    no limit.
    """

    def __init__(self, files: StoredFiles, cache: Path, limit: int | None = None) -> None:
        self.files, self.cache, self.limit = files, cache, limit
        self._mapped: dict[int, tuple[NDArray[np.uint8], IO[bytes] | None]] = {}
        self._future: LookAhead | None = None
        self._ahead: _Ahead | None = None
        self._in_use = np.zeros(0, dtype=np.int64)
        self._process = os.getpid()

    def in_use(self) -> NDArray[np.int64]:
        """The shards that this process uses now, as far as a look ahead has told; rising."""
        return self._in_use

    @property
    def remote_sizes(self) -> NDArray[np.int64]:
        """Bytes that each shard takes in the cache."""
        return np.where(self.files.remote, self.files.size, 0)

    def tar(self, shard: int) -> NDArray[np.uint8]:
        """The bytes of a shard, verified and memory-mapped on first use; ShardError naming it."""
        self._leave_parent()
        found = self._mapped.get(shard)
        if found is None:
            try:
                found = self._map(shard)
            except DataError as error:
                raise ShardError(str(error), shard) from error
            self._mapped[shard] = found
        return found[0]

    def _map(self, shard: int) -> tuple[NDArray[np.uint8], IO[bytes] | None]:
        """The mapped bytes of a shard, and the open file whose lock keeps it from eviction."""
        file = self.files[shard]
        while True:
            path = local_file(file, self.cache, budget=self._budget(0.0))
            # Another process may evict it before it is locked here: then it is fetched again.
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
                unlock(f)
                f.close()

    def _leave_parent(self) -> None:
        """After a fork: threads are not there, and locks are the parent's to release."""
        if self._process != os.getpid():
            for _, f in self._mapped.values():
                if f:
                    f.close()
            self._mapped, self._ahead, self._process = {}, None, os.getpid()

    def _budget(self, after: float, placed: Callable[[], None] | None = None) -> CacheBudget | None:
        if self.limit is None:
            return None
        return CacheBudget(self.limit, self._due_of, after, placed)

    def _due_of(self, sha256: str) -> float:
        """When a file of the cache is needed next; before any look ahead, ours are in use."""
        shards = self.files.numbers(sha256)
        if not shards:
            return np.inf
        return float(self._future.due(np.asarray(shards)).min()) if self._future else -1.0

    # --- ahead ----------------------------------------------------------------------------------

    def look_ahead(self, ahead: LookAhead, threads: int) -> None:
        """Take a new future: unmap the shards that this process does not use now, and have so many
        threads fetch those needed before the run's end, the ones needed first before the others."""
        self._leave_parent()
        self._in_use = ahead.now()
        mine = set(self._in_use.tolist())
        self._unmap([shard for shard in self._mapped if shard not in mine])
        self._future = ahead
        if threads == 0:
            return
        if self._ahead is None:
            if budget := self._budget(0.0):
                shrink(self.cache, budget)
            self._ahead = _Ahead(self._fetch, threads)
        # What only later windows need fills free room (the module's docstring says why).
        wanted: dict[int, float] = {}
        for shard, when, soon in ahead.upcoming():
            wanted.setdefault(shard, when if soon or self.limit is None else np.inf)
        self._ahead.want(list(wanted.items()))

    def stop(self) -> None:
        """Let go of everything. The threads end; a download under way is finished first."""
        self._leave_parent()
        self._unmap(list(self._mapped))
        if self._ahead:
            self._ahead.stop()
            self._ahead = None

    def _fetch(self, shard: int, after: float, placed: Callable[[], None]) -> None:
        """Bring a shard into the cache, displacing only what is due later than `after`; `placed` is
        called when it has its room."""
        file = self.files[shard]
        if self.limit is None or not file.remote:
            placed()
        if not is_local(file, self.cache):
            local_file(file, self.cache, budget=self._budget(after, placed), wait=False)


class _Ahead:
    """Threads that bring shards, first things first, until they are told to stop."""

    def __init__(self, fetch: Callable[[int, float, Callable[[], None]], None], threads: int):
        self._fetch = fetch
        # Held by the thread that chooses a shard until that has its room: what is needed first
        # gets room first.
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._wanted: list[tuple[int, float]] = []
        self._taken: set[int] = set()  # and not failed
        self._not_before: dict[int, float] = {}
        self._full_until = 0.0
        self._faults: dict[int, int] = {}
        self._stopped = False
        for _ in range(threads):
            threading.Thread(target=self._work, name="lxscale-fetch", daemon=True).start()

    def want(self, shards: list[tuple[int, float]]) -> None:
        """Take new wishes, in the order of need: (shard, the time after which a file has to be due
        to be displaced for it)."""
        with self._changed:
            self._wanted, self._taken, self._full_until = shards, set(), 0.0
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self) -> None:
        """A thread's life: choose a shard, fetch it, remember how that went."""
        while True:
            self._turn.acquire()
            held = True

            def placed() -> None:
                nonlocal held
                if held:
                    held = False
                    self._turn.release()

            try:
                task = self._await()
                if task is None:
                    return
                problem: Exception | None = None
                try:
                    self._fetch(*task, placed)
                except Exception as error:
                    problem = error
                self._settle(task[0], problem)
            finally:
                placed()

    def _await(self) -> tuple[int, float] | None:
        """The next shard to bring; None when told to stop."""
        with self._changed:
            while not self._stopped:
                if task := self._take():
                    return task
                self._changed.wait(_PAUSE if len(self._taken) < len(self._wanted) else None)
        return None

    def _take(self) -> tuple[int, float] | None:
        now = time.monotonic()
        if now < self._full_until:
            return None
        all_placed = True
        for shard, after in self._wanted:
            if shard in self._taken:
                continue
            # Free room is not filled before what is needed soon has its own.
            if after == np.inf and not all_placed:
                return None
            if self._not_before.get(shard, 0.0) <= now:
                self._taken.add(shard)
                return shard, after
            all_placed = False
        return None

    def _settle(self, shard: int, problem: Exception | None) -> None:
        with self._changed:
            if problem is None:
                self._faults.pop(shard, None)
                return
            self._taken.discard(shard)
            pause = _PAUSE
            if isinstance(problem, FullError):
                # Room comes when files fall out of use; what is due later does not get it first.
                self._full_until = time.monotonic() + pause
            elif not isinstance(problem, BusyError):
                faults = self._faults[shard] = self._faults.get(shard, 0) + 1
                if faults == 1:
                    log.warning("not fetched ahead, tried again later: %s", problem)
                pause = min(_PAUSE * 2**faults, _LONGEST_PAUSE)
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
