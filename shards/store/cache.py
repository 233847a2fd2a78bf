"""The node's cache: verified files under the name of their content.

A file is downloaded to a temporary name, hashed on the way, and only then renamed to its sha256. A
lock per file lets one process of the node do this while the others wait. Nothing is trusted for
being there: a marker remembers which (path, size, mtime, ctime, inode) has been verified since the
machine started, so an unchanged file is hashed once and a changed one is hashed again. What a crash
of the machine left of a file is thus found without waiting for the disk at every download.

    CACHE/files/<sha256>      verified shards; <sha256>.damaged is the last bad one
    CACHE/tables/<sha256>     the same for tables and vocabularies, which no limit counts
    CACHE/merged-<…>          indexes made of tables (derived.py), which no limit counts either
    CACHE/verified/<name>     markers, of cached files and of local data sets used in place
    CACHE/locks/<name>        held while a file is fetched, verified, evicted or written

Under a byte limit of files/ (`CacheBudget`) the files due last make room for those due first. A
process holds a shared lock on each file that it has mapped, and no file in use is evicted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from shards.errors import DataError
from shards.processes import boot_id
from shards.store import objects
from shards.store.atomic import written_whole
from shards.store.locks import BusyError, failed_since, locked, note, unlock
from shards.store.places import expanded
from shards.store.retry import Retry
from shards.store.stored import HashingFile, StoredFile, hash_file

log = logging.getLogger("lxscale")

_DOWNLOADS = 3  # of a file that arrives damaged, before that is an error


@dataclass(frozen=True)
class CacheBudget:
    """A byte limit of files/, and the future by which it is kept."""

    limit: int
    """In bytes."""
    due: Callable[[str], float]
    """sha256 -> when the file is needed next; infinity for a file of no known future."""
    after: float = 0.0
    """Only files due later than this are evicted; with infinity none is."""
    placed: Callable[[], None] | None = None
    """Called each time when there is room for the file that is fetched."""


class FullError(DataError):
    """There is no room, and the caller does not wait."""


def default_cache() -> Path:
    """LXSCALE_CACHE, or lxscale in the user's cache folder."""
    if given := os.environ.get("LXSCALE_CACHE"):
        return Path(expanded(given))
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
    budget: CacheBudget | None = None,
    retry: Retry | None = None,
    wait: bool = True,
) -> Path:
    """A verified path on this machine with the content of `file`; local files are used in place.

    table: it belongs to tables/. Raises DataError naming the file when a local one is damaged or
    missing, or when object storage delivers the wrong content repeatedly. With wait=False, raises
    BusyError where another process fetches the file and FullError where there is no room;
    otherwise both are waited for, the room as long as the store would be.
    """
    cache = Path(cache_dir) if cache_dir else default_cache()
    entry = _Entry.of(file, cache, "tables" if table else "files")
    with explained(entry.place):
        if not _is_marked(entry):
            if file.remote:
                _fetch_once(entry, budget, retry or Retry(), wait)
            else:
                _verify_in_place(entry)
    return entry.path


def is_local(file: StoredFile, cache: Path) -> bool:
    """Whether `local_file` would return at once."""
    return _is_marked(_Entry.of(file, cache))


def hashed_file(path: Path, cache: Path) -> StoredFile:
    """A file that has just been made here, with its hash: so it need not be verified again."""
    before = path.stat()
    file = StoredFile(str(path), hash_file(path), before.st_size)
    entry = _Entry.of(file, cache)
    _mark(entry, _marker_text(entry, before))
    return file


def shrink(cache: Path, budget: CacheBudget) -> None:
    """Keep to a limit that is lower than what an earlier run left."""
    with explained(cache):
        (cache / "files").mkdir(parents=True, exist_ok=True)
        with locked(cache, "room"):
            _evict(cache, 0, budget)


# --- fetching -----------------------------------------------------------------------------------


def _fetch_once(entry: _Entry, budget: CacheBudget | None, retry: Retry, wait: bool) -> None:
    """Download the file unless another process of the node does so first."""
    asked = time.time()
    with locked(entry.cache, entry.file.sha256, wait) as lock:
        if _is_whole(entry):
            return
        # One outage is one error: a process that has waited for the lock through the whole of
        # another's failed try does not try again, and one that came in the middle of it has only
        # the rest of its own deadline left.
        if problem := failed_since(lock, asked):
            raise DataError(problem)
        began = time.time()
        left = replace(retry, deadline=retry.deadline - (began - asked))
        try:
            _download(entry, budget, left, wait)
        except FullError:
            raise
        except DataError as error:
            note(lock, began, str(error))
            raise


def _is_whole(entry: _Entry) -> bool:
    """Whether the cached file is there and good; a bad one is set aside."""
    path = entry.path
    if not path.exists():
        return False
    if _is_marked(entry):
        return True
    problem = _verify(entry)
    if problem:
        log.warning(
            "%s is damaged (%s): set aside, fetching %s again", path, problem, entry.file.url
        )
        os.replace(path, path.with_suffix(".damaged"))
    return not problem


def _download(entry: _Entry, budget: CacheBudget | None, retry: Retry, wait: bool) -> None:
    file, problem = entry.file, None
    for _ in range(_DOWNLOADS):
        # A process that counts files/ could miss a file which changes its name meanwhile.
        renaming = locked(entry.cache, "room")
        with written_whole(entry.path, durable=False, alone=True, renaming=renaming) as temporary:
            if budget:
                _make_room(entry, temporary, budget, retry.deadline if wait else None)
            with open(temporary, "r+b" if budget else "wb") as f:
                target = HashingFile(f)
                objects.download(file.url, target, file.size, retry)
                f.truncate()
                problem = file.problem(f.tell(), target.sha256())
            if problem:
                temporary.unlink()
        if not problem:
            _mark(entry, _marker_text(entry))
            return
        log.warning("%s arrived damaged (%s)", file.url, problem)
    raise DataError(
        f"{file.url} does not have the content that its manifest names ({problem}): upload it "
        "again or rebuild the data set"
    )


# --- room ---------------------------------------------------------------------------------------


def _make_room(entry: _Entry, temporary: Path, budget: CacheBudget, patience: float | None) -> None:
    """Create `temporary` with the file's size, once files/ has room for it; patience: seconds to
    wait for that, None for not at all."""
    cache, size = entry.cache, entry.file.size
    began = time.monotonic()
    while True:
        with locked(cache, "room"):
            if _evict(cache, size, budget):
                with open(temporary, "wb") as f:
                    f.truncate(size)  # which counts as used from now on
                break
        if patience is None:
            raise FullError(f"no room in {cache} before the files there are used")
        if time.monotonic() - began > patience:
            raise DataError(
                f"the cache {cache} is full: its limit of {budget.limit:,} bytes is taken by files "
                f"in use, and {size:,} more are needed; raise data.cache_limit_gb, lower "
                "sampler.window, or give runs on the same node caches of their own"
            )
        time.sleep(0.1)
    if budget.placed:
        budget.placed()


def _evict(cache: Path, size: int, budget: CacheBudget) -> bool:
    """Remove the files that are due last until `size` more bytes fit into the limit; whether they
    do now. The caller holds the lock `room`."""
    entries = []
    used = 0
    with os.scandir(cache / "files") as found:
        for entry in found:
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                used += status.st_size
                entries.append((entry.name, status.st_size, status.st_mtime))
    if used + size <= budget.limit:
        return True

    def due(name: str) -> float:
        return float("inf") if name.endswith((".damaged", ".tmp")) else budget.due(name)

    ranked = sorted(entries, key=lambda e: (-due(e[0]), e[2]))
    for name, bytes_, _ in ranked:
        if used + size <= budget.limit:
            break
        if due(name) > budget.after and _remove_unused(cache, name):
            used -= bytes_
    return used + size <= budget.limit


def _remove_unused(cache: Path, name: str) -> bool:
    """Remove a file of files/ unless a process has it open, or is fetching or verifying it."""
    path = cache / "files" / name
    try:
        with locked(cache, name.removeprefix(".").split(".")[0], wait=False), open(path, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            unlock(f)
            (cache / "verified" / _name_of(path)).unlink(missing_ok=True)
    except (BusyError, BlockingIOError):
        return False
    except FileNotFoundError:
        pass
    return True


# --- verification -------------------------------------------------------------------------------


def _verify_in_place(entry: _Entry) -> None:
    """Check a local file; DataError where it is not what it must be."""
    with locked(entry.cache, _name_of(entry.path)):
        # Another process may have verified it meanwhile.
        if not _is_marked(entry) and (problem := _verify(entry)):
            raise DataError(f"{entry.path} is damaged: {problem}; restore it or build it again")


def _verify(entry: _Entry) -> str | None:
    """What is wrong with the file; None, and a marker, where it is good."""
    before = _marker_text(entry)
    size = entry.path.stat().st_size
    # A file of another size is not worth hashing.
    sha256 = hash_file(entry.path) if size == entry.file.size else ""
    problem = entry.file.problem(size, sha256)
    if problem is None:
        # The marker describes the file as it was before hashing: a change meanwhile voids it.
        _mark(entry, before)
    return problem


def _mark(entry: _Entry, text: str) -> None:
    with written_whole(_marker(entry), durable=False, alone=True) as temporary:
        temporary.write_text(text)


def _is_marked(entry: _Entry) -> bool:
    try:
        if entry.path.stat().st_size != entry.file.size:
            return False
        return _marker(entry).read_text() == _marker_text(entry)
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return False


def _marker(entry: _Entry) -> Path:
    return entry.cache / "verified" / _name_of(entry.path)


def _marker_text(entry: _Entry, status: os.stat_result | None = None) -> str:
    s = status or entry.path.stat()
    # No program can set ctime: a change that puts mtime back is still seen.
    times = [s.st_mtime_ns, s.st_ctime_ns]
    return json.dumps([boot_id(), str(entry.path), s.st_size, *times, s.st_ino, entry.file.sha256])


def _name_of(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:40]


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turns the errors of a file system into DataErrors that say what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or place} does not exist") from None
    except OSError as error:
        raise DataError(
            f"cannot use {error.filename or place}: {error.strerror}; make room or rights there, "
            "or name another cache folder in LXSCALE_CACHE"
        ) from None
