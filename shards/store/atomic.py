"""Files that are whole as soon as they can be seen: written under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_whole(
    path: Path,
    *,
    durable: bool = True,
    alone: bool = False,
    renaming: AbstractContextManager[Any] | None = None,
) -> Iterator[Path]:
    """A temporary path beside `path`: the file that the block leaves there becomes `path`.

    When the block raises, or removes its file, `path` stays as it was.
    durable: file and name are on the disk at the end, so a crash of the machine loses neither.
    alone: the caller keeps other writers of `path` out. The temporary name is then always the same,
    and what a dead process left there is removed first.
    renaming: a context to rename in, for a lock that is needed at that moment only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    middle = "" if alone else f".{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}{middle}.tmp")
    if alone:
        temporary.unlink(missing_ok=True)
    try:
        yield temporary
        if temporary.exists():
            if durable:
                flush(temporary)
            with renaming or contextlib.nullcontext():
                os.replace(temporary, path)
            if durable:
                flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
