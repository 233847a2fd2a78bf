"""The index of a data set: the tables of all its shards, merged into global arrays.

Any pair's tokens, image and answers are found in it by vector operations. It is made once per node,
in one file that every process maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.format.arrays import map_arrays, save_arrays
from shards.format.manifest import Manifest
from shards.format.members import MEMBERS, members_of
from shards.format.table import I64, Table, open_table

_LAYOUT = 2  # of the file; part of its name


def index_name(manifest: Manifest) -> str:
    """Name of the file in a node's cache."""
    return f"merged-{manifest.fingerprint}-{_LAYOUT}.safetensors"


@dataclass(frozen=True)
class DatasetIndex:
    """All tables of a data set, concatenated: I images, S sentences (= pairs), N shards, K sources,
    T tokens, A answers. In the file, `offset` is a column `<member>_offset` for each member."""

    shard_image: I64
    """[N + 1]: first image of each shard."""
    shard_pair: I64
    """[N + 1]: first pair of each shard."""
    image_objects: NDArray[np.int32]
    """[I]."""
    offset: dict[str, I64]
    """Member -> [I]: bytes from the start of the image's tar to its payload; empty for a member
    that the data set does not have."""
    record_size: I64
    """[I]: bytes of the JSON payload."""
    image_pair: I64
    """[I + 1]: first pair of each image."""
    source: NDArray[np.uint8]
    """[S]: index into the manifest's sources."""
    token_start: I64
    """[S + 1]."""
    tokens: NDArray[np.uint16]
    """[T]."""
    answer_start: I64
    """[S + 1]."""
    answer_id: NDArray[np.int32]
    """[A]."""
    answer_score: NDArray[np.float32]
    """[A]."""
    by_source: I64
    """[S]: pairs sorted by (shard, source, pair)."""
    source_start: I64
    """[N, K]: where in by_source the run of a shard and source begins."""
    image_of: NDArray[np.int32]
    """[S]: image of each pair."""


def save_index(path: Path, index: DatasetIndex) -> None:
    """Write the index's file."""
    arrays = dict(vars(index))
    offset = arrays.pop("offset")
    save_arrays(path, arrays | {m.offset_column: offset[m.name] for m in MEMBERS})


def map_index(path: Path) -> DatasetIndex:
    """Map the index's file. DataError naming it when it is not whole."""
    arrays = map_arrays(path)
    offset = {m.name: arrays.pop(m.offset_column) for m in MEMBERS if m.offset_column in arrays}
    return DatasetIndex(offset=offset, **arrays)


def merge_tables(
    manifest: Manifest, paths: Sequence[Path], sources_of: Sequence[Sequence[int]]
) -> DatasetIndex:
    """The index of shards whose tables are at `paths`, in the manifest's order. sources_of: for
    each shard, its table's sources as indices into the manifest's."""
    tables = [open_table(path) for path in paths]
    source = _joined(
        np.asarray(numbers, dtype=np.uint8)[table.sentence_source]
        for numbers, table in zip(sources_of, tables, strict=True)
    )
    shard_pair = _starts([s.pairs for s in manifest.shards])
    by_source, source_start = _by_source(source, shard_pair, len(manifest.sources))
    image_pair = _chained(tables, lambda t: t.image_sentences)
    there = members_of(manifest.schema)
    none = np.zeros(0, dtype=np.int64)
    return DatasetIndex(
        shard_image=_starts([s.images for s in manifest.shards]),
        shard_pair=shard_pair,
        image_objects=_joined(t.image_objects for t in tables),
        offset={
            m.name: _joined(t.offset[m.name] for t in tables) if m in there else none
            for m in MEMBERS
        },
        record_size=_joined(t.record_size for t in tables),
        image_pair=image_pair,
        source=source,
        token_start=_chained(tables, lambda t: t.token_start),
        tokens=_joined(t.tokens for t in tables),
        answer_start=_chained(tables, lambda t: t.answer_start),
        answer_id=_joined(t.answer_id for t in tables),
        answer_score=_joined(t.answer_score for t in tables),
        by_source=by_source,
        source_start=source_start,
        image_of=np.repeat(np.arange(len(image_pair) - 1, dtype=np.int32), np.diff(image_pair)),
    )


def ranges(start: I64, length: I64) -> I64:
    """[start, start + length) of all rows, one after the other: the positions of ragged rows."""
    total = int(length.sum())
    ends = np.cumsum(length)
    return np.arange(total) - np.repeat(ends - length, length) + np.repeat(start, length)


def _joined(arrays: Iterable[NDArray]) -> NDArray:
    return np.concatenate(list(arrays))


def _starts(counts: Sequence[int] | NDArray) -> I64:
    """Where each of ranges of such lengths begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _chained(tables: Sequence[Table], starts_of: Callable[[Table], I64]) -> I64:
    """The tables' range starts (each one longer than its ranges) as those of one table."""
    return _starts(_joined(np.diff(starts_of(t)) for t in tables))


def _by_source(source: NDArray[np.uint8], shard_pair: I64, sources: int) -> tuple[I64, I64]:
    """`by_source` and `source_start` of the index."""
    shards = len(shard_pair) - 1
    shard_of = np.repeat(np.arange(shards), np.diff(shard_pair))
    by_source = np.lexsort((source, shard_of)).astype(np.int64)
    sizes = np.bincount(shard_of * sources + source, minlength=shards * sources)
    return by_source, _starts(sizes)[:-1].reshape(shards, sources)
