"""The bytes of files/, and which file goes when there is no room for another.

The folder is shared by the processes of a node, and looking at all its files for every download
would cost the more the fuller it is. So the file CACHE/room is a ledger: a line that names it and
the start of the machine, then a line for each change, `<bytes> <name> <crc32>`, saying what a
content takes from then on, under its own name or its temporary one. All changes are made under the
lock `room`; each process reads the lines that it has not seen. A download costs a few lines and
O(log files).

A line is written before a file is made and after one is removed. What a killed process leaves is
thus a ledger that says too much, never too little, until the entry's turn comes to be evicted. A
ledger that is missing, torn or of another start of the machine is made anew by a look at all files,
and so it is, now and then, when nothing else makes room.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import math
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from shards.errors import explained
from shards.processes import boot_id
from shards.store.atomic import written_whole
from shards.store.locks import BusyError, locked, unlock
from shards.store.marks import mark_of

_LEDGER, _LOCK = "room", "room"
_LOOKS = 10.0  # seconds, at least, between two looks at all files
_SPARE = 1000  # lines, beside two for each file, before the ledger is written anew


class Due(Protocol):
    """When files are needed next; time is counted in pairs of the run."""

    def __call__(self, names: Sequence[str]) -> list[float]:
        """When each is; -1 while it is in use, infinity for a file of no known future. Another
        answer than before is given only when that time is past."""


class Room:
    """Room for this process's files in a cache that keeps to `limit` bytes.

    due: when files are needed next; consumed: the present, in the same time; lost: told of the
    contents that are not there any more.
    """

    def __init__(
        self,
        cache: Path,
        limit: int,
        due: Due,
        consumed: Callable[[], float] = lambda: 0.0,
        lost: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.limit = limit
        self._cache, self._due, self._consumed, self._lost = cache, due, consumed, lost
        self._name, self._offset = b"", 0  # of the ledger, and how much of it was read
        self._lines = 0
        self._looked = -math.inf
        self._size: dict[str, int] = {}  # the oldest first
        self._used = 0
        self._before: set[str] = set()  # in a ledger that was forgotten
        # What is known of the future of each file. The one to go is first in `_last`; those whose
        # time may be past are first in `_next`. An entry that is not as `_when` says is void.
        self._when: dict[str, float] = {}
        self._last: list[tuple[float, int, str]] = []
        self._next: list[tuple[float, str]] = []
        self._in_use: set[str] = set()
        self._unknown: list[str] = []
        self._ranked = -math.inf
        self._order = 0

    def take(self, temporary: Path, name: str, size: int, after: float) -> bool:
        """Create the file `temporary` with `size` bytes, for the content `name`, if there is room
        once files due later than `after` have made some."""
        with locked(self._cache, _LOCK):
            self._catch_up()
            need = size - self._size.get(name, 0)
            if not self._evict(need, after):
                if after == math.inf or time.monotonic() - self._looked < _LOOKS:
                    return False
                self._look()
                need = size - self._size.get(name, 0)
                if not self._evict(need, after):
                    return False
            self._write([(size, name)])
            with open(temporary, "wb") as f:
                f.truncate(size)
            return True

    def shrink(self) -> None:
        """Keep to a limit that is lower than what an earlier run left."""
        with explained(self._cache), locked(self._cache, _LOCK):
            self._catch_up()
            self._evict(0, 0.0)

    # --- the ledger -----------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Read what is new in the ledger."""
        try:
            with open(self._cache / _LEDGER, "rb") as f:
                name = f.readline()
                if name != self._name:
                    self._forget(name)
                f.seek(self._offset)
                new = f.read()
            if not _is_of_now(name) or (new and not new.endswith(b"\n")):
                raise ValueError
            for line in new.splitlines():
                size, content = _entry(line)
                self._set(content, size)
        except (FileNotFoundError, ValueError):
            self._look()
            return
        self._tell_lost()
        self._offset += len(new)
        self._lines += new.count(b"\n")
        if self._lines > 2 * len(self._size) + _SPARE:
            self._write_anew()

    def _look(self) -> None:
        """Make the ledger anew by a look at all files."""
        self._forget(b"")
        found = []
        folder = self._cache / "files"
        folder.mkdir(parents=True, exist_ok=True)
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, _content(entry.name), status.st_size))
        for _, content, size in sorted(found):
            self._set(content, size + self._size.get(content, 0))
        self._tell_lost()
        self._looked = time.monotonic()
        self._write_anew()

    def _write_anew(self) -> None:
        self._name = f"{boot_id()} {secrets.token_hex(8)}\n".encode()
        lines = _lines((size, name) for name, size in self._size.items())
        path = self._cache / _LEDGER
        with written_whole(path, durable=False, alone=True) as temporary:
            temporary.write_bytes(self._name + lines)
        self._offset, self._lines = len(self._name) + len(lines), len(self._size)

    def _write(self, changes: Sequence[tuple[int, str]]) -> None:
        self._offset += _append(self._cache, changes)
        self._lines += len(changes)
        for size, name in changes:
            self._set(name, size)

    def _set(self, name: str, size: int) -> None:
        self._used += size - self._size.get(name, 0)
        if not size:
            self._size.pop(name, None)
            self._when.pop(name, None)
            self._in_use.discard(name)
            self._lost(name)
        elif name in self._size:
            self._size[name] = size
        else:
            self._size[name] = size
            self._unknown.append(name)

    def _forget(self, name: bytes) -> None:
        """Know nothing of the ledger, which has this name now."""
        self._name, self._offset, self._lines = name, len(name), 0
        self._before |= self._size.keys()
        self._size, self._used = {}, 0
        self._when, self._last, self._next = {}, [], []
        self._in_use, self._unknown = set(), []

    def _tell_lost(self) -> None:
        """Of what an earlier ledger had, and this one has not."""
        for name in self._before - self._size.keys():
            self._lost(name)
        self._before = set()

    # --- eviction -------------------------------------------------------------------------------

    def _evict(self, need: int, after: float) -> bool:
        """Remove the files that are due last until `need` more bytes fit into the limit; whether
        they do now."""
        if self._used + need <= self.limit:
            return True
        if after == math.inf:
            return False
        self._rank()
        gone: list[str] = []
        kept: list[tuple[float, int, str]] = []
        room = self._used + need - self.limit
        while room > 0 and self._last:
            entry = heapq.heappop(self._last)
            when, name = -entry[0], entry[2]
            if self._when.get(name) != when:
                continue
            (now,) = self._due_of([name])
            if now != when:
                self._know(name, now)  # another may be due later
                continue
            if now <= after:
                kept.append(entry)
                break
            if _remove_unused(self._cache, name):
                gone.append(name)
                room -= self._size[name]
                self._when.pop(name)
            else:
                kept.append(entry)
        for entry in kept:
            heapq.heappush(self._last, entry)
        if gone:
            self._write([(0, name) for name in gone])
        return self._used + need <= self.limit

    def _rank(self) -> None:
        """Ask again for the files whose time may have changed."""
        ask = self._unknown
        self._unknown = []
        consumed = self._consumed()
        if consumed != self._ranked:
            self._ranked = consumed
            ask = [*ask, *self._in_use]
            while self._next and self._next[0][0] <= consumed:
                when, name = heapq.heappop(self._next)
                if self._when.get(name) == when:
                    ask.append(name)
        ask = [name for name in dict.fromkeys(ask) if name in self._size]
        for name, when in zip(ask, self._due_of(ask), strict=True):
            self._know(name, when)
        if len(self._last) > 2 * len(self._when) + _SPARE:  # most of them void
            self._last = [e for e in self._last if self._when.get(e[2]) == -e[0]]
            heapq.heapify(self._last)

    def _know(self, name: str, when: float) -> None:
        self._when[name] = when
        if when <= 0:
            self._in_use.add(name)
            return
        self._in_use.discard(name)
        self._order += 1
        heapq.heappush(self._last, (-when, self._order, name))
        if when < math.inf:
            heapq.heappush(self._next, (when, name))

    def _due_of(self, names: Sequence[str]) -> list[float]:
        return self._due(names) if names else []


def add(cache: Path, path: Path, size: int) -> None:
    """Say that a file of files/ takes so many bytes from now on, for processes that keep a limit
    there. Where none has, there is nothing to say."""
    if path.parent == cache / "files" and (cache / _LEDGER).exists():
        with locked(cache, _LOCK):
            _append(cache, [(size, path.name)])


def set_aside(cache: Path, path: Path) -> None:
    """Give a damaged file its other name."""
    aside = path.with_suffix(".damaged")
    size = path.stat().st_size
    os.replace(path, aside)
    add(cache, path, 0)
    add(cache, aside, size)


def _append(cache: Path, changes: Sequence[tuple[int, str]]) -> int:
    """Write lines to the ledger, and return their bytes; without one, write nothing."""
    lines = _lines(changes)
    path = cache / _LEDGER
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        if os.write(handle, lines) == len(lines):
            return len(lines)
    except OSError:
        path.unlink(missing_ok=True)  # by the next one it is made anew
        raise
    finally:
        os.close(handle)
    path.unlink(missing_ok=True)
    return 0


def _lines(changes: Iterable[tuple[int, str]]) -> bytes:
    texts = (f"{size} {name}".encode() for size, name in changes)
    return b"".join(b"%s %08x\n" % (text, zlib.crc32(text)) for text in texts)


def _entry(line: bytes) -> tuple[int, str]:
    """Bytes and name of a line; ValueError where it is not as it was written."""
    text, _, check = line.rpartition(b" ")
    if check != b"%08x" % zlib.crc32(text):
        raise ValueError("another checksum")
    size, _, name = text.decode().partition(" ")
    return int(size), name


def _is_of_now(name: bytes) -> bool:
    """Whether a ledger of this name is of this start of the machine."""
    return name.endswith(b"\n") and name.startswith(boot_id().encode() + b" ")


def _content(name: str) -> str:
    """The content that a file of files/ has, or will have."""
    if name.startswith(".") and name.endswith(".tmp") and name.count(".") == 2:
        return name[1:-4]
    return name


def _remove_unused(cache: Path, content: str) -> bool:
    """Remove what there is of a content unless a process reads, fetches or verifies it."""
    path = cache / "files" / content
    temporary = path.with_name(f".{content}.tmp")
    try:
        with locked(cache, content.removeprefix(".").split(".")[0], wait=False):
            temporary.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                unlock(f)
                mark_of(cache, path).unlink(missing_ok=True)
    except (BusyError, BlockingIOError):
        return False
    return True
