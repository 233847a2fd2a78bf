"""Reading the tars of shards: memory-mapped, a bounded number of them at a time.

A map is copied from faster than a file is read: by a fifth to a third, where it is read again and
again as in training. But a map costs a descriptor, which Python keeps for it. So those used last
are kept, as many as the limit of open files allows with ease; another one is mapped again in some
30 us.

A file is verified before it is mapped first. What it was then is compared with what it is before
each batch, so that a file that was cut or changed is verified again: it is fetched once more, or
refused. (What is cut between that look and the copy, some milliseconds, ends the process by
SIGBUS.)
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import ShardError, node_error
from shards.store.cache import Verified
from shards.store.marks import identity_of

_MOST = 1024  # files that are mapped at a time
_TRIES = 5  # at a file that changes while it is used


@dataclass(frozen=True)
class Run:
    """A run of bytes in each of n files, and where they go."""

    at: NDArray[np.int64]
    """[n]: where it begins."""
    size: NDArray[np.int64]
    """[n]: its bytes, not more than a row of `out` has."""
    out: NDArray
    """[n, …], contiguous. The rest of a row is filled with zeros."""


@dataclass(frozen=True)
class _Mapped:
    file: Verified
    content: memoryview
    descriptor: int | None
    """By which the lock that keeps the file from eviction can be released."""


class Reader:
    """The files of shards by number, for one thread.

    verified: the file of a shard, fetched if need be; raises ShardError or NodeError. A file of the
    cache is locked against eviction while it is mapped. One that is not mapped may be evicted for
    another run on the node, and is fetched again: a lock for each shard in use would be a
    descriptor for each. evicts: whether this process may evict what it has mapped itself, so that
    locks have to go at once, which takes one more descriptor for each.
    """

    def __init__(self, verified: Callable[[int], Verified], evicts: bool) -> None:
        self._verified, self._evicts = verified, evicts
        self._most = _files_at_a_time(2 if evicts else 1)
        self._mapped: OrderedDict[int, _Mapped] = OrderedDict()  # the one used last is at the end
        self._known: dict[int, Verified] = {}
        self._process = os.getpid()

    def read_rows(self, shards: NDArray[np.int64], runs: Sequence[Run]) -> None:
        """Fill row i of every run's `out` from the file of shard `shards[i]`.

        Raises ShardError where a shard cannot be had, NodeError where this machine is at fault.
        """
        if self._process != os.getpid():
            self._leave_parent()
        # One shard after the other, so that no more than one has to be mapped at a time.
        order = np.argsort(shards, kind="stable")
        first = np.flatnonzero(np.diff(shards[order], prepend=-1))
        rows = [part.tolist() for part in np.split(order, first[1:])] if len(order) else []
        # Offsets become plain integers all at once, and bytes go from memoryview to memoryview: for
        # a small member, indexing arrays row by row would cost more than the copy. Filling is the
        # other way round, and seldom: most data sets have the same number of objects in each image.
        columns = [
            (run.at.tolist(), run.size.tolist(), run.out.reshape(-1).view(np.uint8).data, width)
            for run in runs
            for width in [run.out.nbytes // max(len(run.out), 1)]
        ]
        for shard, of_shard in zip(shards[order[first]].tolist(), rows, strict=True):
            content = self._content(shard)
            for at, size, target, width in columns:
                for row in of_shard:
                    begin, n, to = at[row], size[row], row * width
                    target[to : to + n] = content[begin : begin + n]
                    if n < width:
                        target[to + n : to + width] = bytes(width - n)

    # --- maps -----------------------------------------------------------------------------------

    def _content(self, shard: int) -> memoryview:
        """The bytes of a shard, which is as it was verified."""
        for _ in range(_TRIES):
            if (found := self._mapped.get(shard)) is None:
                found = self._map(shard)
            elif found.file.is_still():
                self._mapped.move_to_end(shard)
            else:
                self._drop(shard)
                del self._known[shard]
                found = None
            if found is not None:
                return found.content
        path = self._verified(shard).path
        raise ShardError(f"{path} changes while it is used: let no one write to it", shard)

    def _map(self, shard: int) -> _Mapped | None:
        """Map a shard's file; None if it is not the one that was verified."""
        while len(self._mapped) >= self._most:
            self._drop(next(iter(self._mapped)))
        if shard not in self._known:
            self._known[shard] = self._verified(shard)
        file = self._known[shard]
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if file.cached:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                status = os.fstat(descriptor)
                if not status.st_nlink or identity_of(status) != file.identity:
                    raise FileNotFoundError  # evicted, or another file by now
                content = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
            except BaseException:
                os.close(descriptor)
                raise
        except FileNotFoundError:
            del self._known[shard]
            return None
        except OSError as error:
            raise node_error(file.path, error) from None
        if not self._evicts:
            os.close(descriptor)  # the map has another one, which keeps the lock
        kept = descriptor if self._evicts else None
        found = self._mapped[shard] = _Mapped(file, content, kept)
        return found

    def _drop(self, shard: int) -> None:
        descriptor = self._mapped.pop(shard).descriptor
        if descriptor is not None:  # closing does not unlock while a forked process has it open
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def keep(self, shards: Collection[int]) -> None:
        """Let go of all shards but these."""
        if self._process != os.getpid():
            self._leave_parent()
        for shard in [s for s in self._mapped if s not in shards]:
            self._drop(shard)
        self._known = {s: known for s, known in self._known.items() if s in shards}

    def _leave_parent(self) -> None:
        """After a fork: the locks are the parent's to release."""
        self._close()
        self._mapped.clear()
        self._process = os.getpid()

    def _close(self) -> None:
        for mapped in self._mapped.values():
            if mapped.descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(mapped.descriptor)

    __del__ = _close


def _files_at_a_time(descriptors: int) -> int:
    """How many files a reader may have mapped, with so many descriptors for each: a process has
    some readers, and other uses of descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(min(_MOST, soft // 4 // descriptors), 1)
