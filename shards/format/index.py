"""The index of a data set: the tables of shards, merged into global arrays.

Any pair's tokens, image and answers are found in it by vector operations. That of all shards is
made once per node, in one file that every process maps; that of a window's is made in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.arrays import Layout, array_sizes, create_arrays, map_arrays
from shards.format.manifest import Manifest
from shards.format.members import MEMBERS, has_member, members_of
from shards.format.shard_list import ShardInfo
from shards.format.table import Table, check_table, open_table
from shards.order.draws import I64
from shards.store.cache import Verified

LAYOUT = 4
"""Of the index's file."""

_TRIES = 5  # to open a table that goes from the cache again and again

T = TypeVar("T")


@dataclass(frozen=True)
class TableFile:
    """A shard's table on this machine."""

    verified: Verified
    where: str
    """Its URL, for messages."""
    manifest: Manifest
    """Of its data set."""
    shard: ShardInfo
    sources: Sequence[int]
    """The numbers that its sources have in the index."""


@dataclass(frozen=True)
class DatasetIndex:
    """Tables of N shards, concatenated: I images, S sentences (= pairs), K sources, T tokens,
    A answers. In the file, `offset` is a column `<member>_offset` for each member.

    Shards, images and pairs are numbered as they come here; in the index of all shards that is
    their number in the data."""

    shard: I64
    """[N]: numbers of the shards in the data, rising."""
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

    @cached_property
    def source_sizes(self) -> I64:
        """[N, K]: pairs of each shard and source."""
        flat = np.append(self.source_start.reshape(-1), len(self.source))
        return np.diff(flat).reshape(self.source_start.shape)

    def place_of(self, shard: I64) -> I64:
        """Where shards of the data are in the index."""
        return np.searchsorted(self.shard, shard)


def map_index(path: Path) -> DatasetIndex:
    """Map the index's file, which is locked against `lxscale cache clean` while it is. DataError
    naming it when it is not whole."""
    return _index(map_arrays(path, locked=True))


def merge_into_file(
    path: Path, manifest: Manifest, shards: I64, table_of: Callable[[int], TableFile]
) -> None:
    """Write the index of some shards as a file: one table is open at a time, and little memory is
    needed however many there are. See `merge`."""
    _merge(manifest, shards, table_of, lambda layout: create_arrays(path, layout))


def merge(manifest: Manifest, shards: I64, table_of: Callable[[int], TableFile]) -> DatasetIndex:
    """The index of some shards, in memory. manifest: of all data together; shards: numbers of the
    shards in it, rising; table_of: the table of each.

    Raises DataError naming the table when something is in it that cannot be.
    """

    def empty(layout: Layout) -> dict[str, NDArray]:
        return {name: np.empty(shape, kind) for name, (kind, shape) in layout.items()}

    return _index(_merge(manifest, shards, table_of, empty))


def _index(arrays: Mapping[str, NDArray]) -> DatasetIndex:
    offsets = {m.offset_column: m.name for m in MEMBERS}
    return DatasetIndex(
        offset={name: arrays[column] for column, name in offsets.items()},
        **{name: array for name, array in arrays.items() if name not in offsets},
    )


def _used(table_of: Callable[[int], TableFile], number: int, use: Callable[[TableFile], T]) -> T:
    """What `use` makes of a table, which is as it was verified before and after; asked for again
    where it has changed meanwhile, or has gone from the cache."""
    for _ in range(_TRIES):
        file = table_of(number)
        problem: Exception | None = None
        try:
            out = use(file)
        except (ValueError, IndexError) as error:  # as of a file that is another by now
            problem = error
        if file.verified.is_still():
            if problem:
                raise problem
            return out
    raise problem or DataError(
        f"{file.verified.path} changes while it is used: let no one write to it"
    )


def _merge(
    manifest: Manifest,
    shards: I64,
    table_of: Callable[[int], TableFile],
    new: Callable[[Layout], dict[str, NDArray]],
) -> dict[str, NDArray]:
    """Fill the arrays of an index, which `new` makes."""
    tokens, answers = 0, 0
    for number in shards.tolist():
        sizes = _used(table_of, number, lambda file: array_sizes(file.verified.path))
        # One that lacks an array is told of where it is opened.
        tokens, answers = tokens + sizes.get("tokens", 0), answers + sizes.get("answer_id", 0)
    shard_image = _starts(manifest.shards.images[shards])
    shard_pair = _starts(manifest.shards.pairs[shards])
    images, pairs = int(shard_image[-1]), int(shard_pair[-1])
    there = {m.offset_column: has_member(manifest.schema, m) for m in MEMBERS}
    wide = manifest.schema.vocab_size > 65535
    out = new(
        {
            "shard": ("<i8", (len(shards),)),
            "shard_image": ("<i8", (len(shards) + 1,)),
            "shard_pair": ("<i8", (len(shards) + 1,)),
            "image_objects": ("<i4", (images,)),
            **{column: ("<i8", (images * here,)) for column, here in there.items()},
            "record_size": ("<i8", (images,)),
            "image_pair": ("<i8", (images + 1,)),
            "source": ("<u1", (pairs,)),
            "token_start": ("<i8", (pairs + 1,)),
            "tokens": ("<u4" if wide else "<u2", (tokens,)),
            "answer_start": ("<i8", (pairs + 1,)),
            "answer_id": ("<i4", (answers,)),
            "answer_score": ("<f4", (answers,)),
            "by_source": ("<i8", (pairs,)),
            "source_start": ("<i8", (len(shards), len(manifest.sources))),
            "image_of": ("<i4", (pairs,)),
        }
    )
    out["shard"][:], out["shard_image"][:], out["shard_pair"][:] = shards, shard_image, shard_pair
    for name in ("image_pair", "token_start", "answer_start"):
        out[name][0] = 0
    token, answer = 0, 0
    for i, number in enumerate(shards.tolist()):
        table = _used(table_of, number, partial(_copy, out, i, token, answer))
        token, answer = token + len(table.tokens), answer + len(table.answer_id)
    return out


def _copy(out: dict[str, NDArray], i: int, token: int, answer: int, file: TableFile) -> Table:
    """Fill in the table of the index's shard i, whose tokens and answers begin there."""
    table = open_table(file.verified.path)
    check_table(table, file.shard, file.manifest, file.where)
    image, pair = int(out["shard_image"][i]), int(out["shard_pair"][i])
    of_images = slice(image, image + len(table.image_objects))
    of_pairs = slice(pair, pair + len(table.sentence_source))
    source = np.asarray(file.sources, dtype=np.uint8)[table.sentence_source]
    out["image_objects"][of_images] = table.image_objects
    out["record_size"][of_images] = table.record_size
    for member in members_of(file.manifest.schema):
        out[member.offset_column][of_images] = table.offset[member.name]
    out["image_pair"][image + 1 : of_images.stop + 1] = table.image_sentences[1:] + pair
    out["source"][of_pairs] = source
    out["token_start"][pair + 1 : of_pairs.stop + 1] = table.token_start[1:] + token
    out["tokens"][token : token + len(table.tokens)] = table.tokens
    out["answer_start"][pair + 1 : of_pairs.stop + 1] = table.answer_start[1:] + answer
    out["answer_id"][answer : answer + len(table.answer_id)] = table.answer_id
    out["answer_score"][answer : answer + len(table.answer_id)] = table.answer_score
    out["by_source"][of_pairs] = np.argsort(source, kind="stable") + pair
    sizes_by_source = np.bincount(source, minlength=out["source_start"].shape[1])
    out["source_start"][i] = _starts(sizes_by_source)[:-1] + pair
    numbers = np.arange(of_images.start, of_images.stop, dtype=np.int32)
    out["image_of"][of_pairs] = np.repeat(numbers, np.diff(table.image_sentences))
    return table


def ranges(start: I64, length: I64) -> I64:
    """[start, start + length) of all rows, one after the other: the positions of ragged rows."""
    total = int(length.sum())
    ends = np.cumsum(length)
    return np.arange(total) - np.repeat(ends - length, length) + np.repeat(start, length)


def _starts(counts: NDArray) -> I64:
    """Where each of ranges of such lengths begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
