"""The shards that a manifest lists, as columns: no object a shard until one is asked for.

Up to INLINE shards stand in the manifest itself, for people to read. More are in pages, safetensors
files of PAGE shards whose hashes the manifest holds: arrays as soon as they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shards.errors import DataError
from shards.format.arrays import parse_arrays, save_arrays
from shards.order.draws import I64
from shards.store import objects
from shards.store.stored import StoredFile, StoredFiles

INLINE = 4096
PAGE = 10_000

# Objects of a data set lie flat in their folder: a name may not lead anywhere else.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_NAMES = re.compile(rf"(?:{_NAME.pattern}\n)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Sums over all shards stay far below 2^63.
Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its tar, its table, and what they hold; sizes in bytes."""

    name: str
    """Of the tar."""
    size: Count
    sha256: str
    table: str
    table_size: Count
    table_sha256: str
    images: Count
    pairs: Count
    pairs_per_source: dict[str, Count]

    def tar_at(self, place: str) -> StoredFile:
        """The tar, of a data set whose files are at `place`."""
        return StoredFile(objects.join(place, self.name), self.sha256, self.size)

    def table_at(self, place: str) -> StoredFile:
        """The table, of a data set whose files are at `place`."""
        return StoredFile(objects.join(place, self.table), self.table_sha256, self.table_size)


@dataclass(frozen=True, eq=False)
class ShardList(Sequence[ShardInfo]):
    """N shards; each column has a row a shard."""

    sources: tuple[str, ...]
    name: NDArray[np.bytes_]
    size: I64
    sha256: NDArray[np.uint8]
    """(N, 32)."""
    table: NDArray[np.bytes_]
    table_size: I64
    table_sha256: NDArray[np.uint8]
    """(N, 32)."""
    images: I64
    pairs: I64
    pairs_per_source: I64
    """(N, sources)."""

    @classmethod
    def of(cls, shards: Iterable[ShardInfo], sources: Sequence[str]) -> ShardList:
        """ValueError where a shard is not as one can be."""
        rows = list(shards)
        column = {source: i for i, source in enumerate(sources)}
        per_source = np.zeros((len(rows), len(sources)), dtype=np.int64)
        for row, shard in zip(per_source, rows, strict=True):
            for source, pairs in shard.pairs_per_source.items():
                if source not in column:
                    raise ValueError(f"{shard.name} has sources that the data set has not")
                row[column[source]] = pairs
        return cls(
            tuple(sources),
            _names([s.name for s in rows]),
            np.asarray([s.size for s in rows], dtype=np.int64),
            _hashes([(s.name, s.sha256) for s in rows]),
            _names([s.table for s in rows]),
            np.asarray([s.table_size for s in rows], dtype=np.int64),
            _hashes([(s.table, s.table_sha256) for s in rows]),
            np.asarray([s.images for s in rows], dtype=np.int64),
            np.asarray([s.pairs for s in rows], dtype=np.int64),
            per_source,
        )

    @classmethod
    def joined(cls, lists: Sequence[ShardList], sources: Sequence[str]) -> ShardList:
        """Shards of several lists, one after the other; `sources` has those of all."""
        per_source = np.zeros((sum(map(len, lists)), len(sources)), dtype=np.int64)
        first = 0
        for part in lists:
            own = [list(sources).index(s) for s in part.sources]
            per_source[first : first + len(part), own] = part.pairs_per_source
            first += len(part)
        columns = {
            name: np.concatenate([getattr(part, name) for part in lists])
            for name in _COLUMNS
            if name != "pairs_per_source"
        }
        return cls(tuple(sources), pairs_per_source=per_source, **columns)

    def __len__(self) -> int:
        return len(self.size)

    @overload
    def __getitem__(self, i: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, i: slice) -> ShardList: ...
    def __getitem__(self, i: int | slice) -> ShardInfo | ShardList:
        if isinstance(i, slice):
            return ShardList(self.sources, **{name: getattr(self, name)[i] for name in _COLUMNS})
        pairs = zip(self.sources, self.pairs_per_source[i].tolist(), strict=True)
        return ShardInfo(
            name=self.name[i].decode(),
            size=int(self.size[i]),
            sha256=self.sha256[i].tobytes().hex(),
            table=self.table[i].decode(),
            table_size=int(self.table_size[i]),
            table_sha256=self.table_sha256[i].tobytes().hex(),
            images=int(self.images[i]),
            pairs=int(self.pairs[i]),
            pairs_per_source={source: n for source, n in pairs if n},
        )

    @cached_property
    def pair_start(self) -> I64:
        """First pair of each shard, and the number of all: (N + 1,)."""
        return np.concatenate([[0], np.cumsum(self.pairs)])

    def __iter__(self) -> Iterator[ShardInfo]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardList):
            return NotImplemented
        mine, others = ([getattr(x, name) for name in _COLUMNS] for x in (self, other))
        return self.sources == other.sources and all(map(np.array_equal, mine, others))

    __hash__ = None  # type: ignore[assignment]

    # --- files ------------------------------------------------------------------------------------

    def tars(self, places: Sequence[tuple[str, int]]) -> StoredFiles:
        """The tars. places: folders or URLs of data sets, each with the number of the first shard
        that is not there any more."""
        return StoredFiles(places, self.name, self.sha256, self.size)

    def tables(self, places: Sequence[tuple[str, int]]) -> StoredFiles:
        """The tables, likewise."""
        return StoredFiles(places, self.table, self.table_sha256, self.table_size)

    # --- checks -----------------------------------------------------------------------------------

    def check(self) -> None:
        """ValueError where something does not hold that does in every manifest."""
        for column in (self.size, self.table_size, self.images, self.pairs):
            if len(column) and not 0 <= int(column.min()) <= int(column.max()) < 2**53:
                raise ValueError("a shard has a size or count that cannot be")
        names = [*self.name.tolist(), *self.table.tolist()]
        if not _NAMES.fullmatch((b"\n".join(names) + b"\n").decode("ascii", "replace")):
            odd = next(n for n in names if not _NAME.fullmatch(n.decode("ascii", "replace")))
            raise ValueError(f"{odd.decode(errors='replace')!r:.80} is not a plain file name")
        if len(set(names)) != len(names):
            raise ValueError("a file is named twice")
        per_source = self.pairs_per_source
        if per_source.size and (per_source.min() < 0 or per_source.max() >= 2**53):
            raise ValueError("a shard has a number of pairs that cannot be")
        if len(wrong := np.flatnonzero(per_source.sum(1) != self.pairs)):
            name = self.name[wrong[0]].decode()
            raise ValueError(f"the pairs per source of {name} do not add up")

    # --- pages ------------------------------------------------------------------------------------

    def save_page(self, path: Path) -> None:
        """Write the shards as a page."""
        arrays = {name: getattr(self, name) for name in _COLUMNS}
        for name in ("name", "table"):
            column = arrays[name]
            arrays[name] = column.view(np.uint8).reshape(len(column), column.itemsize)
        save_arrays(path, arrays)


_COLUMNS = tuple(name for name in ShardList.__annotations__ if name != "sources")


def parse_page(data: NDArray[np.uint8], sources: tuple[str, ...], where: str) -> ShardList:
    """The shards of a page; DataError naming `where` it comes from when it is none."""
    arrays = parse_arrays(data, where)
    if set(arrays) != set(_COLUMNS):
        raise DataError(f"{where} is no page of a manifest: build the data set again")
    columns: dict[str, NDArray] = dict(arrays)
    count = columns["size"].size
    rows = {"sha256": 32, "table_sha256": 32, "pairs_per_source": len(sources)}
    rows |= {n: columns[n].shape[-1] if columns[n].ndim else 0 for n in ("name", "table")}
    for name, array in columns.items():
        shape = (count, rows[name]) if name in rows else (count,)
        kind = np.int64 if name == "pairs_per_source" or name not in rows else np.uint8
        if array.shape != shape or array.dtype != kind or not array.size:
            raise DataError(f"{where}: {name} has shape {array.shape} and type {array.dtype}")
    for name in ("name", "table"):
        text = np.ascontiguousarray(columns[name])
        columns[name] = text.view(f"S{text.shape[1]}").reshape(count)
    return ShardList(sources, **columns)


def _names(names: Sequence[str]) -> NDArray[np.bytes_]:
    for name in names:
        check_name(name)
    return np.asarray(names, dtype=np.bytes_) if names else np.zeros(0, dtype="S1")


def _hashes(files: Sequence[tuple[str, str]]) -> NDArray[np.uint8]:
    for name, sha256 in files:
        check_hash(name, sha256)
    raw = bytes.fromhex("".join(sha256 for _, sha256 in files))
    return np.frombuffer(raw, dtype=np.uint8).reshape(len(files), 32)


def check_hash(name: str, sha256: str) -> None:
    """ValueError unless it can be the sha256 of a file."""
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"the sha256 of {name} is {sha256!r:.80}")


def check_name(name: str) -> None:
    """ValueError unless it is a plain file's name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r:.80} is not a plain file name")
