"""The node's cache: verified files under the name of their content.

A file is downloaded to a temporary name, hashed on the way, and only then renamed to its sha256. A
lock per file lets one process of the node do this while the others wait. Nothing is trusted for
being there: a marker remembers which (path, size, mtime, ctime, inode) has been verified since the
machine started, so an unchanged file is hashed once and a changed one is hashed again. What a crash
of the machine left of a file is thus found without waiting for the disk at every download.

    CACHE/files/<sha256>      verified shards; <sha256>.damaged is the last bad one
    CACHE/tables/<sha256>     the same for tables and vocabularies, which no limit counts
    CACHE/verified/<name>     markers, of cached files and of local data sets used in place
    CACHE/locks/<name>        held while a file is fetched, verified, evicted or written

Under a byte limit of files/ (`CacheBudget`) the files due last make room for those due first. A
process holds a shared lock on each file that it has mapped, and no file in use is evicted.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from shards.errors import DataError
from shards.store import objects
from shards.store.locks import BusyError, failed_since, locked, note, unlock
from shards.store.retry import Retry

log = logging.getLogger("lxscale")


@dataclass(frozen=True)
class CacheBudget:
    """A byte limit of files/, and the future by which it is kept.

    due: sha256 -> when the file is needed next; a file of no known future is due at infinity.
    after: only files due later than this are evicted, so with infinity none is. made: called each
    time when there is room for the file that is fetched.
    """

    limit: int
    due: Callable[[str], float]
    after: float = 0.0
    made: Callable[[], None] | None = None


class FullError(DataError):
    """There is no room, and the caller does not wait."""


def default_cache() -> Path:
    """LXSCALE_CACHE, or lxscale in the user's cache folder."""
    if given := os.environ.get("LXSCALE_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lxscale"


def local_file(
    url: str,
    sha256: str,
    size: int,
    cache_dir: str | Path | None = None,
    *,
    table: bool = False,
    budget: CacheBudget | None = None,
    retry: Retry | None = None,
    wait: bool = True,
) -> Path:
    """A verified local path with the content of `url`; sha256 in hex, size in bytes.

    Local files are used in place. table: it belongs to tables/. Raises DataError naming the file
    when a local one is damaged or missing, or when object storage delivers the wrong content
    repeatedly; with wait=False BusyError where another process is at it and FullError where there
    is no room; otherwise both are waited for, the room as long as the store would be.
    """
    cache = Path(cache_dir) if cache_dir else default_cache()
    if path := objects.local_path(url):
        path = path.absolute()
        with _explained(path):
            if not _is_marked(path, sha256, size, cache):
                with locked(cache, _name_of(path)):
                    # Another process may have verified it meanwhile.
                    if not _is_marked(path, sha256, size, cache) and (
                        problem := _verify(path, sha256, size, cache)
                    ):
                        raise DataError(
                            f"{path} is damaged: {problem}; restore it or build it again"
                        )
        return path
    path = cache / ("tables" if table else "files") / sha256
    with _explained(cache):
        if not _is_marked(path, sha256, size, cache):
            asked = time.time()
            with locked(cache, sha256, wait) as lock:
                if not _is_whole(path, sha256, size, cache, url):
                    # One outage, one error: who waited through a whole failed try does not repeat
                    # it, and who came during one tries for what its own deadline leaves.
                    if problem := failed_since(lock, asked):
                        raise DataError(problem)
                    began, retry = time.time(), retry or Retry()
                    own = replace(retry, deadline=retry.deadline - (began - asked))
                    try:
                        _fetch(url, path, sha256, size, cache, budget, own, wait)
                    except FullError:
                        raise
                    except DataError as error:
                        note(lock, began, str(error))
                        raise
    return path


def is_local(url: str, sha256: str, size: int, cache: Path) -> bool:
    """Whether `local_file` would return at once."""
    path = objects.local_path(url)
    place = path.absolute() if path else cache / "files" / sha256
    return _is_marked(place, sha256, size, cache)


def shrink(cache: Path, budget: CacheBudget) -> None:
    """Keep to a limit that is lower than what an earlier run left."""
    with _explained(cache):
        (cache / "files").mkdir(parents=True, exist_ok=True)
        with locked(cache, "room"):
            _evict(cache, 0, budget)


def write_once(path: str | Path, build: Callable[[Path], None]) -> Path:
    """`path`, made by `build(temporary path)` unless it is there: one process per node builds it,
    and nobody ever sees it half-written."""
    path = Path(path)
    with _explained(path):
        if not path.exists():
            with locked(path.parent, path.name):
                if not path.exists():
                    with _renamed_when_done(path) as temporary:
                        build(temporary)
    return path


# --- fetching -----------------------------------------------------------------------------------


def _is_whole(path: Path, sha256: str, size: int, cache: Path, url: str) -> bool:
    """Whether the cached file is there and good; a bad one is set aside."""
    if not path.exists():
        return False
    if _is_marked(path, sha256, size, cache):
        return True
    problem = _verify(path, sha256, size, cache)
    if problem:
        log.warning("%s is damaged (%s): set aside, fetching %s again", path, problem, url)
        os.replace(path, path.with_suffix(".damaged"))
    return not problem


def _fetch(
    url: str,
    path: Path,
    sha256: str,
    size: int,
    cache: Path,
    budget: CacheBudget | None,
    retry: Retry | None,
    wait: bool,
) -> None:
    problem: str | None = None
    for _ in range(3):
        # Under the lock: who counts files/ while a file changes its name may miss it.
        with _renamed_when_done(path, lambda: locked(cache, "room"), durable=False) as temporary:
            if budget:
                patience = (retry or Retry()).deadline if wait else None
                _make_room(cache, temporary, size, budget, patience)
            with open(temporary, "r+b" if budget else "wb") as f:
                target = _Hashing(f)
                objects.download(url, target, size, retry)
                f.truncate()
                problem = target.problem(sha256, size)
            if problem:
                temporary.unlink()
        if not problem:
            _mark(path, sha256, cache)
            return
        log.warning("%s arrived damaged (%s)", url, problem)
    raise DataError(
        f"{url} does not have the content that its manifest names ({problem}): upload it again or "
        "rebuild the data set"
    )


@contextlib.contextmanager
def _renamed_when_done(
    path: Path,
    renaming: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    durable: bool = True,
) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block succeeds and leaves it;
    it is renamed in the context `renaming()`, and before that brought to disk if `durable`.

    The caller holds the lock of `path`, so other temporary files of it belong to dead processes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if temporary.exists():
            if durable:
                with open(temporary, "rb") as f:
                    os.fsync(f.fileno())
            with renaming():
                os.replace(temporary, path)
            if durable:
                objects.sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


# --- room ---------------------------------------------------------------------------------------


def _make_room(
    cache: Path, temporary: Path, size: int, budget: CacheBudget, patience: float | None
) -> None:
    """Create `temporary` with its full size, once files/ has room for it."""
    began = time.monotonic()
    while True:
        with locked(cache, "room"):
            if _evict(cache, size, budget):
                with open(temporary, "wb") as f:
                    f.truncate(size)  # counts from now on
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
    if budget.made:
        budget.made()


def _evict(cache: Path, size: int, budget: CacheBudget) -> bool:
    """Remove the files that are due last until `size` bytes fit into the limit."""
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


def hash_file(path: str | Path) -> str:
    """sha256 (hex) of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class _Hashing:
    """An open file that hashes what is written to it."""

    def __init__(self, f: IO[bytes]) -> None:
        self._f, self._digest = f, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._f.write(data)

    def problem(self, sha256: str, size: int) -> str | None:
        return _problem(self._f.tell(), size, self._digest.hexdigest(), sha256)


def _problem(actual: int, size: int, found: str, sha256: str) -> str | None:
    """What is wrong with a content of `actual` bytes and hash `found`."""
    if actual != size:
        return f"{actual} bytes instead of {size}"
    if found != sha256:
        return f"sha256 {found[:12]}… instead of {sha256[:12]}…"
    return None


def _verify(path: Path, sha256: str, size: int, cache: Path) -> str | None:
    """What is wrong with the file; None, and a marker, where it is good."""
    before = _marker_text(path, sha256)
    actual = path.stat().st_size
    problem = _problem(actual, size, hash_file(path) if actual == size else "", sha256)
    if problem is None:
        # The marker describes the file as it was before hashing: a change meanwhile voids it.
        _mark(path, sha256, cache, before)
    return problem


def _mark(path: Path, sha256: str, cache: Path, text: str | None = None) -> None:
    marker = cache / "verified" / _name_of(path)
    with _renamed_when_done(marker, durable=False) as temporary:
        temporary.write_text(text or _marker_text(path, sha256))


def _is_marked(path: Path, sha256: str, size: int, cache: Path) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        return (cache / "verified" / _name_of(path)).read_text() == _marker_text(path, sha256)
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return False


def _marker_text(path: Path, sha256: str) -> str:
    s = path.stat()
    # No program can set ctime: a change that puts mtime back is still seen.
    times = [s.st_mtime_ns, s.st_ctime_ns]
    return json.dumps([_boot(), str(path), s.st_size, *times, s.st_ino, sha256])


@functools.cache
def _boot() -> str:
    """What is another number each time that the machine starts."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _name_of(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:40]


@contextlib.contextmanager
def _explained(place: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or place} does not exist") from None
    except OSError as error:
        raise DataError(
            f"cannot use {error.filename or place}: {error.strerror}; make room or rights there, "
            "or name another cache folder in LXSCALE_CACHE"
        ) from None
