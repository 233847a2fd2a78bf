"""Reading the tars of shards by `pread`, with a bounded number of descriptors and no map.

A map would cost address space for each shard, and a file that is cut while it is mapped ends the
process by SIGBUS. Reading is no slower: what lies side by side in a tar comes by one call.

A file is verified before it is opened first, and what it was then is remembered. When it is opened
again it has to be the same, or is verified again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shards.errors import ShardError, node_error
from shards.store.cache import Verified
from shards.store.marks import identity_of

_MOST = 128  # descriptors
_GAP = 4096  # bytes that are rather read for nothing than passed over by another call
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


class Reader:
    """The files of shards by number, for one thread.

    verified: the file of a shard, fetched if need be; raises ShardError or NodeError. locked:
    whether an open file is locked against eviction. One that is not open may be evicted for another
    run on the node, and is then fetched again: a lock for each shard in use would be a descriptor
    for each.
    """

    def __init__(self, verified: Callable[[int], Verified], locked: bool) -> None:
        self._verified, self._locked = verified, locked
        self._most = _descriptors()
        self._open: OrderedDict[int, int] = OrderedDict()  # the one used last is at the end
        self._known: dict[int, Verified] = {}
        self._process = os.getpid()

    def read_rows(self, shards: NDArray[np.int64], runs: Sequence[Run]) -> None:
        """Fill row i of every run's `out` from the file of shard `shards[i]`.

        Raises ShardError where a shard cannot be had or ends too soon, NodeError where this machine
        is at fault.
        """
        if not len(shards):
            return
        if self._process != os.getpid():
            self._leave_parent()
        # By place: a file is opened once, and disks read forwards.
        order = np.lexsort((runs[0].at, shards))
        for group in _side_by_side(runs):
            self._read_group(shards[order].tolist(), group, order)

    def _read_group(self, shards: list[int], runs: list[Run], order: NDArray[np.int64]) -> None:
        # Plain integers all at once: indexing arrays row by row would cost more than the copy.
        columns = [
            (
                run.at[order].tolist(),
                run.size[order].tolist(),
                run.out.reshape(-1).view(np.uint8).data,
                run.out[0].nbytes,
            )
            for run in runs
        ]
        first = columns[0][0]
        passed = memoryview(bytearray(_GAP))
        shard, descriptor = -1, -1
        for i, row in enumerate(order.tolist()):
            if shards[i] != shard:
                shard = shards[i]
                descriptor = self._descriptor(shard)
            buffers, end = [], first[i]
            for at, size, target, width in columns:
                begin, n, to = at[i], size[i], row * width
                if begin > end:
                    buffers.append(passed[: begin - end])
                buffers.append(target[to : to + n])
                if n < width:
                    target[to + n : to + width] = bytes(width - n)
                end = begin + n
            if self._read(shard, descriptor, buffers, first[i]) < end - first[i]:
                self._read_again(shard, buffers, first[i], end)
                shard = -1

    def _read(self, shard: int, descriptor: int, buffers: list[memoryview], at: int) -> int:
        try:
            return os.preadv(descriptor, buffers, at)
        except OSError as error:
            raise node_error(self._known[shard].path, error) from None

    def _read_again(self, shard: int, buffers: list[memoryview], begin: int, end: int) -> None:
        """Read what came short, from a file that has been verified once more: that fetches a cut
        one again, or refuses it."""
        for _ in range(_TRIES):
            path = self._known[shard].path
            self._close(shard)
            self._known.pop(shard)
            descriptor = self._descriptor(shard)
            at, left = begin, buffers
            # Some file systems give less than they have.
            while at < end and (count := self._read(shard, descriptor, left, at)):
                at += count
                left = _behind(left, count)
            if at >= end:
                return
        raise ShardError(f"{path} ends before byte {end:,}, and changes while it is read", shard)

    # --- descriptors ----------------------------------------------------------------------------

    def _descriptor(self, shard: int) -> int:
        """The open file of a shard."""
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        while len(self._open) >= self._most:
            self._close(next(iter(self._open)))
        for _ in range(_TRIES):
            if shard not in self._known:
                self._known[shard] = self._verified(shard)
            found = self._opened(self._known[shard])
            if found is not None:
                self._open[shard] = found
                return found
            path = self._known.pop(shard).path  # evicted, or another file by now
        raise ShardError(f"{path} changes while it is used: let no one write to it", shard)

    def _opened(self, known: Verified) -> int | None:
        """The descriptor of a file, if it is the one that was verified."""
        try:
            descriptor = os.open(known.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise node_error(known.path, error) from None
        try:
            if self._locked:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            status = os.fstat(descriptor)
            if status.st_nlink and identity_of(status) == known.identity:
                return descriptor
        except OSError as error:
            os.close(descriptor)
            raise node_error(known.path, error) from None
        os.close(descriptor)
        return None

    def _close(self, shard: int) -> None:
        descriptor = self._open.pop(shard)
        if self._locked:  # closing does not unlock while a forked process has the file open
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def keep(self, shards: Collection[int]) -> None:
        """Close the files of all shards but these."""
        if self._process != os.getpid():
            self._leave_parent()
        for shard in [s for s in self._open if s not in shards]:
            self._close(shard)
        self._known = {s: known for s, known in self._known.items() if s in shards}

    def _leave_parent(self) -> None:
        """After a fork: the locks are the parent's to release."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        self._process = os.getpid()

    def __del__(self) -> None:
        for descriptor in self._open.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _side_by_side(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs that one call reads. A tar has a record's members one after the other, each behind a
    header."""
    ordered = sorted(runs, key=lambda run: int(run.at[0]))
    groups = [[ordered[0]]]
    for before, run in pairwise(ordered):
        gap = run.at - before.at - before.size
        if 0 <= int(gap.min()) <= int(gap.max()) <= _GAP:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _behind(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of buffers whose first `count` bytes are filled."""
    out = []
    for buffer in buffers:
        if count < len(buffer):
            out.append(buffer[count:])
        count = max(count - len(buffer), 0)
    return out


def _descriptors() -> int:
    """How many descriptors a reader may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(min(_MOST, soft // 4), 1)
