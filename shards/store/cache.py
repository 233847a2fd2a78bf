"""The node's cache: verified files under the name of their content.

A file is downloaded to a temporary name, hashed on the way, and only then renamed to its sha256. A
lock per file lets one process of the node do this while the others wait. Nothing is trusted for
being there: a mark (marks.py) remembers what has been verified since the machine started. What a
crash of the machine left of a file is thus found without waiting for the disk at every download.

    CACHE/files/<sha256>      verified shards; <sha256>.damaged is the last bad one
    CACHE/tables/<sha256>     the same for tables and vocabularies, which no limit counts
    CACHE/merged-<…>          indexes made of tables (derived.py), which no limit counts either
    CACHE/verified/<name>     marks, of cached files and of local data sets used in place
    CACHE/locks/<name>        held while a file is fetched, verified, evicted or written
    CACHE/room                what files/ holds, where a limit was kept (room.py)
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from shards.errors import DataError, NodeError, explained
from shards.store import marks, objects, room
from shards.store.atomic import written_whole
from shards.store.locks import failed_since, forget, locked, note, now
from shards.store.marks import Identity, identity_of, name_of
from shards.store.places import expanded
from shards.store.retry import Retry
from shards.store.room import Room
from shards.store.stored import HashingFile, StoredFile, hash_file

log = logging.getLogger("lxscale")

_DOWNLOADS = 3  # of a file that arrives damaged, before that is an error
_CHECKS = 10  # of a file that changes while it is verified


@dataclass(frozen=True)
class Verified:
    """A file of this machine that has been verified."""

    path: Path
    identity: Identity
    """That it had then."""
    cached: bool
    """Whether it lies in the cache, from which it may be removed."""

    def is_still(self) -> bool:
        """Whether it is what it was when it was verified."""
        try:
            return identity_of(os.stat(self.path)) == self.identity
        except OSError:
            return False


@dataclass(frozen=True)
class Budget:
    """How one file gets its room under a byte limit."""

    room: Room
    after: float = 0.0
    """Only files due later than this are evicted for it; with infinity none is."""
    placed: Callable[[], None] | None = None
    """Called each time when there is room for the file."""


class FullError(NodeError):
    """There is no room, and the caller does not wait."""


def cache_folder(given: str | Path | None = None) -> Path:
    """The folder that is given, or LXSCALE_CACHE, or lxscale in the user's cache folder."""
    if given := given or os.environ.get("LXSCALE_CACHE"):
        return Path(expanded(str(given)))
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lxscale"


@dataclass(frozen=True)
class _Entry:
    """A file with its place on this node: in the cache, or its own where it is local already."""

    file: StoredFile
    cache: Path
    path: Path

    @classmethod
    def of(cls, file: StoredFile, cache: Path, folder: str = "files") -> _Entry:
        local = objects.local_path(file.url)
        return cls(file, cache, local.absolute() if local else cache / folder / file.sha256)

    @property
    def place(self) -> Path:
        """What a user can put right when it cannot be used."""
        return self.cache if self.file.remote else self.path


def local_file(
    file: StoredFile,
    cache_dir: str | Path | None = None,
    *,
    table: bool = False,
    budget: Budget | None = None,
    retry: Retry | None = None,
    wait: bool = True,
) -> Path:
    """A verified path on this machine with the content of `file`; local files are used in place.

    table: it belongs to tables/. Raises DataError naming the file when a local one is damaged or
    missing, or when object storage delivers the wrong content repeatedly; NodeError where this
    machine is at fault. With wait=False, raises BusyError where another process fetches the file
    and FullError where there is no room; otherwise both are waited for, the room as long as the
    store would be.
    """
    cache = cache_folder(cache_dir)
    folder = "tables" if table else "files"
    return verified_file(file, cache, folder=folder, budget=budget, retry=retry, wait=wait).path


def verified_file(
    file: StoredFile,
    cache: Path,
    *,
    folder: str = "files",
    budget: Budget | None = None,
    retry: Retry | None = None,
    wait: bool = True,
) -> Verified:
    """Like `local_file`, with what the file was when it was found good."""
    entry = _Entry.of(file, cache, folder)
    with explained(entry.place):
        for _ in range(_CHECKS):
            if identity := _marked(entry):
                return Verified(entry.path, identity, file.remote)
            if file.remote:
                _fetch_once(entry, budget, retry or Retry(), wait)
            else:
                _verify_in_place(entry)
    raise DataError(f"{entry.path} changes while it is verified: let no one write to it")


def is_local(file: StoredFile, cache: Path) -> bool:
    """Whether `local_file` would return at once."""
    return _marked(_Entry.of(file, cache)) is not None


def hashed_file(path: Path, cache: Path) -> StoredFile:
    """A file that has just been made here, with its hash: so it need not be verified again."""
    before = path.stat()
    file = StoredFile(str(path), hash_file(path), before.st_size)
    entry = _Entry.of(file, cache)
    marks.mark(cache, entry.path, file.sha256, identity_of(before))
    return file


# --- fetching -----------------------------------------------------------------------------------


def _fetch_once(entry: _Entry, budget: Budget | None, retry: Retry, wait: bool) -> None:
    """Download the file unless another process of the node does so first."""
    asked = now()
    with locked(entry.cache, entry.file.sha256, wait) as lock:
        if _is_whole(entry):
            return
        # One outage is one error: a process that has waited for the lock through the whole of
        # another's failed try does not try again, and one that came in the middle of it has only
        # the rest of its own deadline left.
        if problem := failed_since(lock, asked):
            raise DataError(problem)
        began = now()
        left = replace(retry, deadline=retry.deadline - (began - asked))
        try:
            _download(entry, budget, left, wait)
        except NodeError:
            raise
        except DataError as error:
            note(lock, began, str(error))
            raise
        forget(lock)


def _is_whole(entry: _Entry) -> bool:
    """Whether the cached file is there and good; a bad one is set aside."""
    path = entry.path
    if not path.exists():
        return False
    if _marked(entry):
        return True
    problem = _verify(entry)
    if problem:
        log.warning(
            "%s is damaged (%s): set aside, fetching %s again", path, problem, entry.file.url
        )
        room.set_aside(entry.cache, path)
    return not problem


def _download(entry: _Entry, budget: Budget | None, retry: Retry, wait: bool) -> None:
    file = entry.file
    for _ in range(_DOWNLOADS):
        try:
            problem = _receive(entry, budget, retry, wait)
        finally:
            if not entry.path.exists():
                room.add(entry.cache, entry.path, 0)
        if not problem:
            marks.mark(entry.cache, entry.path, file.sha256, identity_of(entry.path.stat()))
            return
        log.warning("%s arrived damaged (%s)", file.url, problem)
    raise DataError(
        f"{file.url} does not have the content that its manifest names ({problem}): upload it "
        "again or rebuild the data set"
    )


def _receive(entry: _Entry, budget: Budget | None, retry: Retry, wait: bool) -> str | None:
    """Download the file to its path, but for one that is not as it must be; what is wrong."""
    file = entry.file
    # A process that looks at all of files/ could miss a file which changes its name meanwhile.
    renaming = locked(entry.cache, "room")
    with written_whole(entry.path, durable=False, alone=True, renaming=renaming) as temporary:
        if budget:
            _make_room(entry, temporary, budget, retry.deadline if wait else None)
        else:
            room.add(entry.cache, entry.path, file.size)
        with open(temporary, "r+b" if budget else "wb") as f:
            target = HashingFile(f)
            objects.download(file.url, target, file.size, retry)
            f.truncate()
            problem = file.problem(f.tell(), target.sha256())
        if problem:
            temporary.unlink()
    return problem


def _make_room(entry: _Entry, temporary: Path, budget: Budget, patience: float | None) -> None:
    """Create `temporary` with the file's size, once files/ has room for it; patience: seconds to
    wait for that, None for not at all."""
    size, within = entry.file.size, budget.room
    began = time.monotonic()
    while not within.take(temporary, entry.path.name, size, budget.after):
        if patience is None:
            raise FullError(f"no room in {entry.cache} before the files there are used")
        if time.monotonic() - began > patience:
            raise NodeError(
                f"the cache {entry.cache} is full: its limit of {within.limit:,} bytes is taken by "
                f"files in use, and {size:,} more are needed; raise data.cache_limit_gb, lower "
                "sampler.window, or give runs on the same node caches of their own"
            )
        time.sleep(0.1)
    if budget.placed:
        budget.placed()


# --- verification -------------------------------------------------------------------------------


def _verify_in_place(entry: _Entry) -> None:
    """Check a local file; DataError where it is not what it must be."""
    with locked(entry.cache, name_of(entry.path)):
        # Another process may have verified it meanwhile.
        if not _marked(entry) and (problem := _verify(entry)):
            raise DataError(f"{entry.path} is damaged: {problem}; restore it or build it again")


def _verify(entry: _Entry) -> str | None:
    """What is wrong with the file; None, and a mark, where it is good."""
    before = entry.path.stat()
    # A file of another size is not worth hashing.
    sha256 = hash_file(entry.path) if before.st_size == entry.file.size else ""
    problem = entry.file.problem(before.st_size, sha256)
    if problem is None:
        # The mark describes the file as it was before hashing: a change meanwhile voids it.
        marks.mark(entry.cache, entry.path, entry.file.sha256, identity_of(before))
    return problem


def _marked(entry: _Entry) -> Identity | None:
    """What the file is, if it is as it was when it was verified."""
    try:
        status = entry.path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    identity = identity_of(status)
    if status.st_size != entry.file.size:
        return None
    same = marks.is_marked(entry.cache, entry.path, entry.file.sha256, identity)
    return identity if same else None
