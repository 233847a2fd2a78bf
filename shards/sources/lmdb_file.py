"""LMDB databases, read page by page.

The C library maps the file and trusts it: one that is cut off, or has a wrong size in a node, ends
the process (SIGBUS, SIGSEGV). Here every page is read and checked, and damage is an error that
names the database. It also needs no lock file and no room for one, and survives fork.

Layout of version 1 (LMDB 0.9, 64-bit, little-endian; libraries/liblmdb/mdb.c): pages 0 and 1 hold
the same meta data in turns, the greater transaction counts; a B+tree of branch and leaf pages holds
keys in order; large values have overflow pages of their own. Databases in databases, and more than
one value a key, are not read.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError
from shards.store import objects

FILE = "data.mdb"
"""In the folder of a database."""

_MAGIC = 0xBEEFC0DE
_META = struct.Struct("<IIQQ" + 2 * "IHHQQQQQ" + "QQ")
_PAGE = struct.Struct("<QHHHH")  # number, padding, flags, lower and upper end of the free room
_NODE = struct.Struct("<HHHH")  # size (low, high), flags, size of the key
_HEAD = 16  # bytes of a page before its content
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_BIG = 1  # flag of a node whose value is on overflow pages
_NONE = (1 << 64) - 1  # root of a tree without pages
_DEEPEST = 32
_LONGEST_VALUE = 1 << 30


@dataclass(frozen=True)
class _Node:
    key: bytes
    page: int
    """Of a branch: the page below. Of a leaf: the first overflow page, or -1."""
    size: int
    value: bytes
    """Of a leaf without overflow pages."""


@dataclass(frozen=True)
class Lmdb:
    """An open database. Its functions raise DataError where it is damaged."""

    path: str
    file: int
    page_size: int
    root: int
    pages: int

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        number = self.root
        for _ in range(_DEEPEST):
            if number == _NONE:
                return None
            nodes, leaf = self._nodes(number)
            if leaf:
                found = next((n for n in nodes if n.key == key), None)
                return None if found is None else self._value(found)
            # The key of a first node counts as less than any other.
            number = [n for i, n in enumerate(nodes) if i == 0 or n.key <= key][-1].page
        raise self._damaged("its pages lie in a circle")

    def keys(self) -> Iterator[bytes]:
        """All keys in order."""
        if self.root != _NONE:
            yield from self._keys(self.root, 0)

    def _keys(self, number: int, depth: int) -> Iterator[bytes]:
        if depth == _DEEPEST:
            raise self._damaged("its pages lie in a circle")
        nodes, leaf = self._nodes(number)
        for node in nodes:
            if leaf:
                yield node.key
            else:
                yield from self._keys(node.page, depth + 1)

    def _nodes(self, number: int) -> tuple[list[_Node], bool]:
        """What a page of the tree has, and whether it is a leaf."""
        page = self._read(number, self.page_size)
        _, _, flags, lower, _ = _PAGE.unpack_from(page)
        leaf = flags & (_BRANCH | _LEAF) == _LEAF
        if flags not in (_BRANCH, _LEAF) or not _HEAD <= lower <= len(page) or lower % 2:
            raise self._damaged(f"page {number} is no page of its tree")
        places = struct.unpack_from(f"<{(lower - _HEAD) // 2}H", page, _HEAD)
        if not places:
            raise self._damaged(f"page {number} is empty")
        try:
            return [self._node(page, at, leaf) for at in places], leaf
        except (struct.error, IndexError):
            raise self._damaged(f"page {number} has an entry beyond its end") from None

    def _node(self, page: bytes, at: int, leaf: bool) -> _Node:
        low, high, flags, length = _NODE.unpack_from(page, at)
        begin = at + _NODE.size + length
        if begin > len(page):
            raise IndexError
        key = page[at + _NODE.size : begin]
        if not leaf:
            return _Node(key, low | high << 16 | flags << 32, 0, b"")
        size = low | high << 16
        if flags & ~_BIG:
            raise DataError(
                f"{self.path} has databases in it, or many values a key: it is no set of features"
            )
        if flags & _BIG:
            return _Node(key, struct.unpack_from("<Q", page, begin)[0], size, b"")
        if begin + size > len(page):
            raise IndexError
        return _Node(key, -1, size, page[begin : begin + size])

    def _value(self, node: _Node) -> bytes:
        if node.page < 0:
            return node.value
        (count,) = struct.unpack_from("<I", self._read(node.page, _HEAD), 12)
        due = -(-(_HEAD + node.size) // self.page_size)
        # A value that was replaced by a smaller one keeps its pages.
        if count < due or node.page + count > self.pages or node.size > _LONGEST_VALUE:
            raise self._damaged(f"page {node.page} has a value of another size")
        return self._read(node.page, _HEAD + node.size, overflow=True)[_HEAD:]

    def _read(self, number: int, size: int, overflow: bool = False) -> bytes:
        """From the beginning of a page on."""
        if not 2 <= number < self.pages:
            raise self._damaged(f"it names a page {number} that it does not have")
        try:
            data = os.pread(self.file, size, number * self.page_size)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from None
        if len(data) < size:
            raise self._damaged("it is cut off")
        found, _, flags, _, _ = _PAGE.unpack_from(data)
        if found != number or (overflow and flags != _OVERFLOW):
            raise self._damaged(f"page {number} is another one")
        return data

    def _damaged(self, problem: str) -> DataError:
        return DataError(f"{self.path} is damaged: {problem}; copy it again")


def has_key(place: str, key: bytes) -> bool:
    """Whether a place, the folder of a database or its file, has a key. OSError where it cannot be
    read."""
    try:
        file = _file_of(place)
        if file is None:
            return False
        with opened(str(file)) as database:
            return database.get(key) is not None
    except DataError:
        return False


def files(place: str) -> list[str]:
    """The file of a database. DataError where there is none."""
    try:
        file = _file_of(place)
    except OSError as error:
        raise DataError(f"cannot read {place}: {error.strerror}") from None
    if file is None:
        raise DataError(f"{place} is no LMDB database: give the folder that has its {FILE}")
    return [str(file)]


def _file_of(place: str) -> Path | None:
    path = objects.local_path(place)
    if path is None:
        return None
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        return None
    with open(file, "rb") as f:
        head = f.read(_HEAD + 8)
    return file if head[_HEAD : _HEAD + 4] == _MAGIC.to_bytes(4, "little") else None


@contextlib.contextmanager
def opened(path: str) -> Iterator[Lmdb]:
    """A database of which `path` is the file. DataError where it cannot be read."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    try:
        yield _database(path, file)
    finally:
        os.close(file)


def _database(path: str, file: int) -> Lmdb:
    try:
        first = os.pread(file, _HEAD + _META.size, 0)
        meta = _meta(first)
        page_size = meta[4] if meta else 0
        if page_size not in {1 << n for n in range(9, 17)}:
            raise DataError(f"{path} is no LMDB database, or of another version than 0.9's")
        second = _meta(os.pread(file, _HEAD + _META.size, page_size))
        size = os.fstat(file).st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    assert meta
    newest = second if second and second[-1] > meta[-1] else meta
    root, last = newest[19], newest[20]
    if size < (last + 1) * page_size:
        raise DataError(
            f"{path} is cut off: {size:,} bytes of {(last + 1) * page_size:,}; copy it again"
        )
    return Lmdb(path, file, page_size, root, last + 1)


def _meta(page: bytes) -> tuple[int, ...] | None:
    if len(page) < _HEAD + _META.size or _PAGE.unpack_from(page)[2] != _META_PAGE:
        return None
    meta = _META.unpack_from(page, _HEAD)
    return meta if meta[:2] == (_MAGIC, 1) else None
