"""Stored files: where they are, what they must be, and whether some bytes are one of them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, overload

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True, eq=False)
class StoredFiles(Sequence[StoredFile]):
    """N files as columns: no object a file until one is asked for."""

    places: Sequence[tuple[str, int]]
    """Folders or URLs, each with the number of the first file that is not there any more."""
    name: NDArray[np.bytes_]
    """[N]: of each file in its place."""
    sha256: NDArray[np.uint8]
    """[N, 32]."""
    size: NDArray[np.int64]
    """[N]: in bytes."""

    def __len__(self) -> int:
        return len(self.size)

    @overload
    def __getitem__(self, i: int) -> StoredFile: ...
    @overload
    def __getitem__(self, i: slice) -> list[StoredFile]: ...
    def __getitem__(self, i: int | slice) -> StoredFile | list[StoredFile]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        url = objects.join(self._place(i), self.name[i].decode())
        return StoredFile(url, self.sha256[i].tobytes().hex(), int(self.size[i]))

    def _place(self, i: int) -> str:
        return self.places[bisect_right(self.places, i, key=lambda place: place[1])][0]

    @property
    def remote(self) -> NDArray[np.bool_]:
        """[N]: which have to be fetched before they can be read."""
        counts = np.diff([0, *(end for _, end in self.places)])
        return np.repeat([objects.local_path(url) is None for url, _ in self.places], counts)

    def numbers(self, sha256: str) -> list[int]:
        """The files that have this hash (hex)."""
        wanted = np.frombuffer(bytes.fromhex(sha256), dtype="S32")[0]
        hashes, order = self._sorted
        begin = int(np.searchsorted(hashes, wanted))
        end = int(np.searchsorted(hashes, wanted, side="right"))
        return order[begin:end].tolist()

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
        """The hashes in rising order, and whose they are."""
        hashes = np.ascontiguousarray(self.sha256).view("S32").reshape(len(self))
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order


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
