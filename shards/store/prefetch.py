"""The shards of a data set as one process uses them: verified, read, and fetched ahead of use.

What is needed next is known, so threads (ahead.py) bring the shards into the node's cache in that
order while batches are made of those that are there. A batch that needs a shard before it has
arrived waits for the process that fetches it, or fetches it itself.

Under a byte limit, what is fetched for the windows in use and the next ones displaces what is due
last, and what is fetched for later ones only fills free room. So each shard is downloaded as often
as under the best possible choice (Belady's), and no more: displacing for later windows, too, would
throw away what the current window leaves, and cost about as much as forgetting the oldest first.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, NodeError, ShardError
from shards.store.ahead import Ahead
from shards.store.cache import Budget, Verified, is_local, local_file, verified_file
from shards.store.reader import Reader, Run
from shards.store.retry import Retry
from shards.store.room import Room
from shards.store.stored import StoredFile, StoredFiles


class LookAhead(Protocol):
    """What comes (shards/order/lookahead.py); time is counted in pairs of the run. Other threads
    ask, too: it stays as it is."""

    @property
    def consumed(self) -> float:
        """The present."""

    def now(self) -> NDArray[np.int64]:
        """The shards that this process uses, rising."""

    def due(self, shards: NDArray[np.int64]) -> NDArray[np.float64]:
        """When each shard is needed next; -1 where it is in use, infinity where it is not."""

    def upcoming(self) -> Iterator[tuple[int, float, bool]]:
        """(shard, when, whether a stream is in its window or enters it next) in the order of need;
        0 for those in use."""


class ShardFiles:
    """Shards by number.

    files: their tars; cache: folder of the node's cache; limit: its bytes, None for no limit.
    tables: theirs, where these come and go with the tars.
    """

    def __init__(
        self,
        files: StoredFiles,
        cache: Path,
        limit: int | None = None,
        tables: StoredFiles | None = None,
    ) -> None:
        self.files, self.cache, self.limit, self._tables = files, cache, limit, tables
        self._future: LookAhead | None = None
        self._in_use = np.zeros(0, dtype=np.int64)
        self._reader = Reader(self._verified, evicts=limit is not None)
        self._begin()

    def _begin(self) -> None:
        self._ahead: Ahead | None = None
        self._room: Room | None = None
        if self.limit is not None:
            self._room = Room(self.cache, self.limit, self._due, self._consumed, self._lost)
        self._process = os.getpid()

    def in_use(self) -> NDArray[np.int64]:
        """The shards that this process uses now, as far as a look ahead has told; rising."""
        return self._in_use

    @property
    def remote_sizes(self) -> NDArray[np.int64]:
        """Bytes that each shard takes in the cache."""
        sizes = self.files.size + (self._tables.size if self._tables else 0)
        return np.where(self.files.remote, sizes, 0)

    def read_rows(self, shards: NDArray[np.int64], runs: Sequence[Run]) -> None:
        """Read from the tars of shards (see `Reader.read_rows`), which are fetched if need be."""
        self._leave_parent()
        self._reader.read_rows(shards, runs)

    def path(self, shard: int) -> Path:
        """The verified tar of a shard on this machine; ShardError naming it, or NodeError."""
        self._leave_parent()
        return self._verified(shard).path

    def table(self, shard: int) -> Verified:
        """The table of a shard on this machine, likewise."""
        self._leave_parent()
        assert self._tables is not None
        return self._get(self._tables[shard], shard)

    def _verified(self, shard: int) -> Verified:
        return self._get(self.files[shard], shard)

    def _get(self, file: StoredFile, shard: int) -> Verified:
        try:
            return verified_file(file, self.cache, budget=self._budget(0.0))
        except NodeError:
            raise
        except DataError as error:
            raise ShardError(str(error), shard) from error

    def _leave_parent(self) -> None:
        """After a fork: threads are not there, and may have been at work on anything."""
        if self._process != os.getpid():
            self._begin()

    # --- room -----------------------------------------------------------------------------------

    def _budget(self, after: float, placed: Callable[[], None] | None = None) -> Budget | None:
        return Budget(self._room, after, placed) if self._room else None

    def _shards_of(self, sha256: str) -> list[int]:
        """The shards that have a file with this hash, or name of another kind."""
        try:
            found = self.files.numbers(sha256)
            return found or (self._tables.numbers(sha256) if self._tables else [])
        except ValueError:
            return []

    def _due(self, names: Sequence[str]) -> list[float]:
        """When files of the cache are needed next; before any look ahead, ours are in use."""
        of = [self._shards_of(name) for name in names]
        if self._future is None:
            return [-1.0 if shards else np.inf for shards in of]
        every = np.asarray([*chain.from_iterable(of)], dtype=np.int64)
        due = iter(self._future.due(every).tolist())
        return [min((next(due) for _ in shards), default=np.inf) for shards in of]

    def _consumed(self) -> float:
        return self._future.consumed if self._future else 0.0

    def _lost(self, name: str) -> None:
        if self._ahead:
            self._ahead.lost(self._shards_of(name))

    # --- ahead ----------------------------------------------------------------------------------

    def look_ahead(self, future: LookAhead, threads: int) -> None:
        """Take a new future: close the shards that this process does not use now, and have so many
        threads fetch those needed before the run's end, the ones needed first before the others."""
        self._leave_parent()
        self._future, self._in_use = future, future.now()
        self._reader.keep(set(self._in_use.tolist()))
        if threads == 0:
            return
        if self._ahead is None:
            if self._room:
                self._room.shrink()
            self._ahead = Ahead(self._fetch, threads, len(self.files))
        self._ahead.want(future.upcoming(), future.consumed)

    def stop(self) -> None:
        """Let go of everything. The threads end; a download under way is broken off."""
        self._leave_parent()
        self._reader.keep(())
        if self._ahead:
            self._ahead.stop()
        self._future = None
        self._begin()

    def _fetch(
        self, shard: int, after: float, placed: Callable[[], None], over: threading.Event
    ) -> None:
        """Bring a shard into the cache, displacing only what is due later than `after`; `placed` is
        called when it has its room. StoppedError once it is over."""
        retry = Retry(over=over)
        if self._tables:
            table = self._tables[shard]
            if not is_local(table, self.cache):
                local_file(table, self.cache, budget=self._budget(after), retry=retry, wait=False)
        file = self.files[shard]
        if self._room is None or not file.remote:
            placed()
        if not is_local(file, self.cache):
            budget = self._budget(after, placed)
            local_file(file, self.cache, budget=budget, retry=retry, wait=False)


def check_limit(files: ShardFiles, working_set: int) -> None:
    """DataError where the cache cannot hold the shards that are in use at one time (bytes)."""
    if files.limit is not None and files.limit < working_set:
        digits = 3 - len(str(working_set)) + 9  # three that count, of GiB, rounded up
        enough = math.ceil(working_set / 2**30 * 10**digits) / 10**digits
        raise DataError(
            f"the cache limit of {_size(files.limit)} is below the working set of "
            f"{_size(working_set)}, the shards that steps in flight can need at once: raise "
            f"data.cache_limit_gb to {enough:g} or more, or lower sampler.window"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.3f} GiB ({count:,} bytes)"
