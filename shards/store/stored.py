"""A stored file: where it is, what it must be, and whether some bytes are it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shards.store import objects


@dataclass(frozen=True)
class StoredFile:
    """Where an object is and what it must be."""

    url: str
    sha256: str
    """Of its content, in hex."""
    size: int
    """In bytes."""

    @property
    def remote(self) -> bool:
        """Whether it has to be fetched before it can be mapped."""
        return objects.local_path(self.url) is None

    def problem(self, size: int, sha256: str) -> str | None:
        """What is wrong with a content of so many bytes and such a hash; None where it is this."""
        if size != self.size:
            return f"{size} bytes instead of {self.size}"
        if sha256 != self.sha256:
            return f"sha256 {sha256[:12]}… instead of {self.sha256[:12]}…"
        return None


def hash_file(path: str | Path) -> str:
    """sha256 (hex) of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class HashingFile:
    """An open file that hashes what is written to it."""

    def __init__(self, f: IO[bytes]) -> None:
        self._f, self._digest = f, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._f.write(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()
