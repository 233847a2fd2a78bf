"""The node's cache: verified files under the name of their content.

A file is downloaded to a temporary name and hashed on the way, synced, and renamed to its sha256;
it is read back and hashed once more at its first open. A lock per file lets one process of the
node do each of this while the others wait. Nothing is trusted for being there: a marker remembers
which (path, size, mtime, inode) has been verified, so an unchanged file is hashed once per node.

    CACHE/files/<sha256>      verified downloads; <sha256>.damaged is the last bad one
    CACHE/verified/<name>     markers, of cached files and of local data sets used in place
    CACHE/locks/<name>        held while a file is fetched, verified or written
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from shards import store
from shards.errors import DataError

log = logging.getLogger("lxscale")


def default_cache() -> Path:
    """LXSCALE_CACHE, or lxscale in the user's cache folder."""
    if given := os.environ.get("LXSCALE_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lxscale"


def local_file(url: str, sha256: str, size: int, cache_dir: str | Path | None = None) -> Path:
    """A verified local path with the content of `url`; sha256 in hex, size in bytes.

    Local files are used in place. Raises DataError naming the file when a local one is damaged
    or missing, or when object storage delivers the wrong content twice.
    """
    cache = Path(cache_dir) if cache_dir else default_cache()
    if path := store.local_path(url):
        path = path.absolute()
        with _explained(path):
            if not _is_marked(path, sha256, size, cache):
                with _lock(cache, _name_of(path)):
                    # Another process may have verified it meanwhile.
                    if not _is_marked(path, sha256, size, cache) and (
                        problem := _verify(path, sha256, size, cache)
                    ):
                        raise DataError(
                            f"{path} is damaged: {problem}; restore it or build it again"
                        )
        return path
    path = cache / "files" / sha256
    with _explained(cache):
        if not _is_marked(path, sha256, size, cache):
            with _lock(cache, sha256):
                _fetch_until_good(url, path, sha256, size, cache)
    return path


def write_once(path: str | Path, build: Callable[[Path], None]) -> Path:
    """`path`, made by `build(temporary path)` unless it is there: one process per node builds it,
    and nobody ever sees it half-written."""
    path = Path(path)
    with _explained(path):
        if not path.exists():
            with _lock(path.parent, path.name):
                if not path.exists():
                    with _renamed_when_done(path) as temporary:
                        build(temporary)
    return path


def _fetch_until_good(url: str, path: Path, sha256: str, size: int, cache: Path) -> None:
    problem = "not fetched"
    for attempt in range(3):
        if path.exists():
            if _is_marked(path, sha256, size, cache):
                return
            problem = _verify(path, sha256, size, cache) or ""
            if not problem:
                return
            log.warning("%s is damaged (%s): set aside, fetching %s again", path, problem, url)
            os.replace(path, path.with_suffix(".damaged"))
        if attempt == 2:
            break
        with _renamed_when_done(path) as temporary, open(temporary, "wb") as f:
            store.download(url, f, size)
            f.flush()
            os.fsync(f.fileno())
    raise DataError(
        f"{url} does not have the content that its manifest names ({problem}): upload it again or "
        "rebuild the data set"
    )


@contextlib.contextmanager
def _renamed_when_done(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block succeeds.

    The caller holds the lock of `path`, so other temporary files of it belong to dead processes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        store.sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def hash_file(path: str | Path) -> str:
    """sha256 (hex) of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _verify(path: Path, sha256: str, size: int, cache: Path) -> str | None:
    """What is wrong with the file; None, and a marker, where it is good."""
    before = _marker_text(path, sha256)
    actual = path.stat().st_size
    if actual != size:
        return f"{actual} bytes instead of {size}"
    found = hash_file(path)
    if found != sha256:
        return f"sha256 {found[:12]}… instead of {sha256[:12]}…"
    # The marker describes the file as it was before hashing: a change meanwhile invalidates it.
    marker = cache / "verified" / _name_of(path)
    with _renamed_when_done(marker) as temporary:
        temporary.write_text(before)
    return None


def _is_marked(path: Path, sha256: str, size: int, cache: Path) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        return (cache / "verified" / _name_of(path)).read_text() == _marker_text(path, sha256)
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return False


def _marker_text(path: Path, sha256: str) -> str:
    s = path.stat()
    return json.dumps([str(path), s.st_size, s.st_mtime_ns, s.st_ino, sha256])


def _name_of(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:40]


@contextlib.contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """An advisory lock that the kernel releases when its process dies, however it dies."""
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / name, "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


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
