"""The table of a shard: where its images' members are in the tar, and its sentences as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.errors import DataError
from shards.format.arrays import map_arrays
from shards.format.manifest import Manifest, Schema
from shards.format.members import MEMBERS, members_of
from shards.format.shard_list import ShardInfo
from shards.order.draws import I64

BLOCK = 512  # bytes: of a tar's header, and what members begin at multiples of

# Types of the columns that are not int64.
_TYPES = {
    "image_objects": (np.dtype("<i4"),),
    "sentence_source": (np.dtype("<u1"),),
    "tokens": (np.dtype("<u2"), np.dtype("<u4")),
    "answer_id": (np.dtype("<i4"),),
    "answer_score": (np.dtype("<f4"),),
}


@dataclass(frozen=True)
class Table:
    """What a shard holds: I images, S sentences grouped by image in image order, T tokens, A
    answers. In the file, `offset` is a column `<member>_offset` for each member."""

    image_objects: NDArray[np.int32]
    """[I]: objects of an image."""
    offset: dict[str, I64]
    """Member -> [I]: bytes from the start of the tar to its payload. An optional member is here
    where the data set has it."""
    record_size: I64
    """[I]: bytes of the JSON payload; those of the other members follow from image_objects."""
    image_sentences: I64
    """[I + 1]: where an image's sentences begin."""
    sentence_source: NDArray[np.uint8]
    """[S]: index into the manifest's sources."""
    token_start: I64
    """[S + 1]: where a sentence's tokens begin."""
    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    """[T]: WordPiece ids without [CLS] and [SEP]."""
    answer_start: I64
    """[S + 1]: where a sentence's answers begin."""
    answer_id: NDArray[np.int32]
    """[A]: index into the answer table."""
    answer_score: NDArray[np.float32]
    """[A]."""
    sample_offset: I64 | None = None
    """[I]: bytes from the start of the tar to an image's first header, in the tables of tars that
    others wrote (foreign.py). Its members are then anywhere before the next image's first header,
    in any order, with others between them. None: they lie as a build writes them."""


def member_columns(
    objects: ArrayLike, record_size: ArrayLike, offset: Mapping[str, ArrayLike]
) -> dict[str, NDArray]:
    """The arrays of a table that say where members are; offset: by member."""
    offsets = {m.offset_column: offset[m.name] for m in MEMBERS if m.name in offset}
    return {
        "image_objects": np.asarray(objects, dtype=np.int32),
        "record_size": np.asarray(record_size, dtype=np.int64),
        **{name: np.asarray(column, dtype=np.int64) for name, column in offsets.items()},
    }


def open_table(path: str | Path) -> Table:
    """Map a shard's table. Raises DataError naming the file when arrays are absent, of a wrong type
    or length, or do not fit together."""
    arrays = map_arrays(path)
    offsets = {m.offset_column for m in MEMBERS}
    due = {m.offset_column for m in MEMBERS if not m.optional}
    due |= {f.name for f in fields(Table)} - {"offset", "sample_offset"}
    if wrong := due - set(arrays) | set(arrays) - due - offsets - {"sample_offset"}:
        raise DataError(f"{path} has missing or unknown arrays {sorted(wrong)}: build it again")
    for name, array in arrays.items():
        if array.dtype not in _TYPES.get(name, (np.dtype("<i8"),)):
            raise DataError(f"{path}: {name} has type {array.dtype}: build it again")
    table = Table(
        offset={m.name: arrays[m.offset_column] for m in MEMBERS if m.offset_column in arrays},
        **{name: array for name, array in arrays.items() if name not in offsets},
    )
    images, sentences = table.image_objects.size, table.sentence_source.size
    lengths = {
        **dict.fromkeys(sorted((offsets | {"sample_offset"}) & set(arrays)), images),
        "image_objects": images,
        "record_size": images,
        "image_sentences": images + 1,
        "sentence_source": sentences,
        "token_start": sentences + 1,
        "tokens": table.tokens.size,
        "answer_start": sentences + 1,
        "answer_id": table.answer_id.size,
        "answer_score": table.answer_id.size,
    }
    for name, length in lengths.items():
        if arrays[name].shape != (length,):
            raise DataError(
                f"{path}: {name} has shape {arrays[name].shape}, not ({length},): build it again"
            )
    ends = {
        "image_sentences": sentences,
        "token_start": len(table.tokens),
        "answer_start": len(table.answer_id),
    }
    for name, end in ends.items():
        start = arrays[name]
        # No difference of two numbers in 0..end is beyond int64.
        inside = bool(((start >= 0) & (start <= end)).all())
        if not inside or start[0] != 0 or start[-1] != end or bool((np.diff(start) < 0).any()):
            raise DataError(f"{path}: {name} does not rise from 0 to {end}: build it again")
    return table


def check_table(table: Table, shard: ShardInfo, manifest: Manifest, where: str) -> None:
    """DataError naming `where` it is and the array, unless every number of a shard's table can be
    what it stands for: a hash proves who made a file, and not that it is right."""
    schema = manifest.schema

    def refuse(problem: str) -> None:
        raise DataError(f"{where}: {problem}; build the data set again")

    def within(name: str, array: NDArray, least: float, most: float) -> None:
        # Not a number is in no range.
        if len(array) and not (array.min() >= least and array.max() <= most):
            i = int(np.flatnonzero(~((array >= least) & (array <= most)))[0])
            refuse(f"{name}[{i}] is {array[i]}, outside of {least}..{most}")

    counts = len(table.image_objects), len(table.sentence_source)
    if counts != (shard.images, shard.pairs):
        refuse("it has {} images and {} pairs, not as the manifest".format(*counts))
    within("image_objects", table.image_objects, 1, schema.max_objects)
    within("sentences of image", np.diff(table.image_sentences), 1, shard.pairs)
    within("sentence_source", table.sentence_source, 0, len(manifest.sources) - 1)
    found = np.bincount(table.sentence_source, minlength=len(manifest.sources)).tolist()
    if found != [shard.pairs_per_source.get(source, 0) for source in manifest.sources]:
        refuse("its pairs per source are not as the manifest's")
    within("tokens of sentence", np.diff(table.token_start), 0, schema.max_tokens - 2)
    within("tokens", table.tokens, 0, schema.vocab_size - 1)
    within("answer_id", table.answer_id, 0, manifest.answers.count - 1)
    within("answer_score", table.answer_score, 0, 1)
    _check_offsets(table, shard.size, schema, refuse, within)


def _check_offsets(
    table: Table,
    size: int,
    schema: Schema,
    refuse: Callable[[str], None],
    within: Callable[[str, NDArray, float, float], None],
) -> None:
    """Members lie in a tar of `size` bytes one after the other, each with a header before it.

    In a tar of others they lie in any order, with anything between them, and begin where their
    values do, which a .npy has behind a header of its own. What keeps a batch safe holds of them,
    too: each lies within the tar and its own sample, none overlaps another, and values begin at a
    multiple of their size.
    """
    members = members_of(schema)
    if missing := [m.name for m in members if m.name not in table.offset]:
        refuse(f"it has no {missing[0]}_offset")
    objects = table.image_objects.astype(np.int64)
    within("record_size", table.record_size, 2, size)
    begins, ends = [], []
    for member in members:
        begin = table.offset[member.name]
        within(member.offset_column, begin, BLOCK, size)
        length = objects * member.object_bytes(schema) if member.columns else table.record_size
        begins.append(begin)
        ends.append(begin + length)
    if table.sample_offset is not None:
        sizes = [np.dtype(m.columns[0].type).itemsize if m.columns else 1 for m in members]
        _check_samples(table.sample_offset, begins, ends, sizes, size, refuse)
        return
    begin, end = np.stack(begins, 1).reshape(-1), np.stack(ends, 1).reshape(-1)
    before = np.concatenate([[0], end[:-1]])
    wrong = np.flatnonzero((begin < before + BLOCK) | (begin % BLOCK != 0) | (end > size))
    if len(wrong):
        image, m = divmod(int(wrong[0]), len(members))
        refuse(
            f"{members[m].offset_column}[{image}] is {begin[wrong[0]]}, which overlaps what lies "
            f"before it, is no multiple of {BLOCK}, or leads beyond the tar's {size} bytes"
        )


def _check_samples(
    sample: I64,
    begins: list[I64],
    ends: list[I64],
    sizes: list[int],
    size: int,
    refuse: Callable[[str], None],
) -> None:
    """The members of a tar of others: `begins` and `ends` of each member's payloads, whose values
    have `sizes` bytes."""
    limit = np.append(sample, size)
    # No sum of these is beyond int64, as all are within the tar.
    if bool(((sample < 0) | (sample > size) | (sample % BLOCK != 0)).any()):
        refuse(f"a sample_offset is outside of the tar's {size} bytes, or no multiple of {BLOCK}")
    begin, end = np.stack(begins, 1), np.stack(ends, 1)
    order = np.argsort(begin, axis=1, kind="stable")
    begin, end = (np.take_along_axis(a, order, axis=1) for a in (begin, end))
    before = np.concatenate([limit[:-1, None], end[:, :-1]], axis=1)
    after = limit[1:, None]
    wrong = (begin < before + BLOCK) | (end > after) | (begin % np.asarray(sizes)[order] != 0)
    if wrong.any():
        image = int(np.flatnonzero(wrong.any(1))[0])
        refuse(
            f"the members of image {image} overlap, lie outside of its sample or of the tar's "
            f"{size} bytes, or begin at no multiple of a value's size"
        )
