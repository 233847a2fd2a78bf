"""Stored files, read or copied with their hash checked on the way."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shards.errors import DataError, explained
from shards.store import objects
from shards.store.folders import owned_folder
from shards.store.retry import Retry
from shards.store.stored import HashingFile, StoredFile

_TRIES = 3  # at a file that arrives damaged


@contextlib.contextmanager
def scratch(staging: Path | None = None) -> Iterator[Path]:
    """A folder for what is under way where nothing is to be published, removed at the end."""
    parent = staging or Path(tempfile.gettempdir())
    with explained(parent), owned_folder(parent, ".lxscale-build-") as folder:
        yield folder


class _Memory:
    """Bytes that are hashed as they come."""

    def __init__(self) -> None:
        self.content, self.digest = bytearray(), hashlib.sha256()

    def write(self, data: bytes, /) -> None:
        self.digest.update(data)
        self.content += data


def read(file: StoredFile, retry: Retry | None = None) -> memoryview:
    """The content of a file, in memory; DataError naming it where it is not what its manifest says,
    or missing."""
    problem: str | None = None
    for _ in range(_tries(file)):
        memory = _Memory()
        objects.download(file.url, memory, retry=retry)
        problem = file.problem(len(memory.content), memory.digest.hexdigest())
        if not problem:
            return memoryview(memory.content)
    raise _damaged(file, problem)


def copy(file: StoredFile, path: Path, retry: Retry | None = None) -> Path:
    """Copy a file to `path`, which it returns; DataError as `read`, and nothing is there then."""
    problem: str | None = None
    try:
        for _ in range(_tries(file)):
            with open(path, "wb") as f:
                target = HashingFile(f)
                objects.download(file.url, target, retry=retry)
                problem = file.problem(f.tell(), target.sha256())
            if not problem:
                return path
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)
    raise _damaged(file, problem)


def _tries(file: StoredFile) -> int:
    return _TRIES if file.remote else 1


def _damaged(file: StoredFile, problem: str | None) -> DataError:
    return DataError(
        f"{file.url} is damaged ({problem}): restore it or build it again; `lxscale shards verify` "
        "says what else is"
    )
