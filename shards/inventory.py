"""What is in a node's cache, looked at from outside: listed, hashed again, removed.

Processes may be at work in it. What one of them has open, fetches or makes is in use, by the locks
that it holds (cache.py), and is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError
from shards.format.index import LAYOUT
from shards.progress import Progress, no_progress
from shards.store import room
from shards.store.derived import seal_of, sealed_file
from shards.store.locks import BusyError, locked
from shards.store.stored import hash_file

_CONTENT = re.compile(r"[0-9a-f]{64}")
_LOCKED_AS = re.compile(r"[0-9a-f]{64}|merged-[0-9a-f]{64}-\d+\.safetensors")
_TEMPORARY = re.compile(
    r"\.([0-9a-f]{64}|merged-[0-9a-f]{64}-\d+\.safetensors(\.seal)?)(\.[0-9a-f]{8})?\.tmp"
)
_DAMAGED = re.compile(r"[0-9a-f]{64}\.damaged")
_INDEX = re.compile(r"merged-[0-9a-f]{64}-(\d+)\.safetensors")

KINDS = {
    "shard": "verified shards, which data.cache_limit_gb counts",
    "table": "verified tables, vocabularies and pages of manifests",
    "index": "indexes that are made of tables",
    "old index": "such of another version of lxscale",
    "damaged": "set aside as damaged",
    "temporary": "unfinished downloads",
}


@dataclass(frozen=True)
class Item:
    """A file of the cache."""

    path: Path
    kind: str
    size: int
    """In bytes, on the disk."""
    used: float
    """When it was last read or written, in seconds since the epoch, as far as the disk tells."""


def items(cache: Path) -> list[Item]:
    """What a cache holds. DataError where there is none."""
    if not cache.is_dir():
        what = "it is no folder" if cache.exists() else "it does not exist"
        raise DataError(f"{cache} is no cache: {what}; name one with --cache")
    out = []
    for folder, kind in (("files", "shard"), ("tables", "table"), ("", "index")):
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(cache / folder) as found,
        ):
            for entry in found:
                if not entry.is_file(follow_symlinks=False):
                    continue
                name = entry.name
                index = _INDEX.fullmatch(name)
                if _TEMPORARY.fullmatch(name):
                    of = "temporary"
                elif folder and _DAMAGED.fullmatch(name):
                    of = "damaged"
                elif index and not folder:
                    of = "index" if int(index[1]) == LAYOUT else "old index"
                elif folder and _CONTENT.fullmatch(name):
                    of = kind
                else:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    s = entry.stat(follow_symlinks=False)
                    used = max(s.st_atime, s.st_mtime)
                    out.append(Item(Path(entry.path), of, s.st_blocks * 512, used))
    return sorted(out, key=lambda item: (list(KINDS).index(item.kind), item.path))


def in_use(cache: Path, item: Item) -> bool:
    """Whether a process has it open, fetches, verifies or makes it, or it cannot be told: it is
    another user's, or on a disk that is damaged or may only be read."""
    try:
        with _held(cache, item):
            return False
    except FileNotFoundError:
        return False
    except (BusyError, OSError):
        return True


@contextlib.contextmanager
def _held(cache: Path, item: Item) -> Iterator[None]:
    """Hold a file's own lock and that of its name; BusyError or BlockingIOError if it is in use."""
    of = _LOCKED_AS.match(item.path.name.removeprefix("."))
    name = of[0] if of else item.path.name
    with locked(cache, name, wait=False), open(item.path, "rb") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            fcntl.flock(f, fcntl.LOCK_UN)


# --- verify -------------------------------------------------------------------------------------


def verify(cache: Path, progress: Progress = no_progress) -> list[str]:
    """Hash everything again; what is wrong. A damaged file is set aside, or removed where it can be
    made again: no process takes it for good, and one that needs it has it anew."""
    problems = []
    found = [i for i in items(cache) if i.kind in ("shard", "table", "index")]
    total, done = sum(i.size for i in found), 0
    for item in found:
        try:
            # Not while a process makes it: one that is being made has no seal yet.
            with locked(cache, item.path.name, wait=False):
                if problem := _damage(item):
                    problems.append(f"{item.path} is damaged: {problem}")
                    _take_away(cache, item)
        except (FileNotFoundError, BusyError):
            pass
        except OSError as error:
            problems.append(f"{item.path} cannot be looked at: {error.strerror or error}")
        done += item.size
        progress("bytes verified", done, total)
    return problems


def _take_away(cache: Path, item: Item) -> None:
    # Renamed under a reader it stays what that has open.
    if item.kind == "shard":
        room.set_aside(cache, item.path)
    elif item.kind == "table":
        os.replace(item.path, item.path.with_suffix(".damaged"))
    else:
        item.path.unlink()
        seal_of(item.path).unlink(missing_ok=True)


def _damage(item: Item) -> str | None:
    if item.kind != "index":
        found = hash_file(item.path)
        return None if found == item.path.name else f"its sha256 is {found[:12]}…"
    sealed = sealed_file(item.path)
    if sealed is None:
        return "it has no seal"
    return sealed.problem(item.path.stat().st_size, hash_file(item.path))


# --- clean --------------------------------------------------------------------------------------


def to_clean(cache: Path, older: float | None = None, everything: bool = False) -> list[Item]:
    """What `clean` would remove: what nothing uses any more, and with `older` what was not used for
    so many days, or with `everything` all that is not in use."""
    now = time.time()

    def wanted(item: Item) -> bool:
        if everything or item.kind in ("old index", "damaged", "temporary"):
            return True
        return older is not None and now - item.used > older * 86400

    return [item for item in items(cache) if wanted(item) and not in_use(cache, item)]


def clean(cache: Path, chosen: list[Item]) -> list[Item]:
    """Remove files of `to_clean`; those that went. What has come into use meanwhile is left."""
    gone = []
    for item in chosen:
        with contextlib.suppress(BusyError, OSError):
            with _held(cache, item):
                item.path.unlink()
                if "index" in item.kind:
                    seal_of(item.path).unlink(missing_ok=True)
                if item.path.parent == cache / "files":
                    room.add(cache, item.path, 0)
            gone.append(item)
    return gone
