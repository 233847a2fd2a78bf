"""Which files have been verified since the machine started, and as what.

A mark says with which size, times and inode a file was verified. Whoever changes a file changes one
of these, so that an unchanged file is hashed once on a node and a changed one again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from shards.processes import boot_id
from shards.store.atomic import written_whole

Identity = tuple[int, int, int, int, int]
"""Device, inode, size, and times of change in ns, of content and of all."""


def identity_of(status: os.stat_result) -> Identity:
    s = status
    # No program can set ctime: a change that puts mtime back is still seen.
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def mark(cache: Path, path: Path, sha256: str, identity: Identity) -> None:
    """Remember that the file was found with this content. The caller holds the file's lock."""
    with written_whole(mark_of(cache, path), durable=False, alone=True) as temporary:
        temporary.write_text(_text(path, sha256, identity))


def is_marked(cache: Path, path: Path, sha256: str, identity: Identity) -> bool:
    try:
        return mark_of(cache, path).read_text() == _text(path, sha256, identity)
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return False


def mark_of(cache: Path, path: Path) -> Path:
    """Where the mark of a file is."""
    return cache / "verified" / name_of(path)


def name_of(path: Path) -> str:
    """A file name for a path."""
    return hashlib.sha256(str(path).encode()).hexdigest()[:40]


def _text(path: Path, sha256: str, identity: Identity) -> str:
    return json.dumps([boot_id(), str(path), *identity, sha256])
