"""The table of a shard: where its images' members are in the tar, and its sentences as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.errors import DataError
from shards.format.arrays import map_arrays
from shards.format.members import MEMBERS

I64 = NDArray[np.int64]


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
    """Map a shard's table. Raises DataError naming the file when arrays are absent or of a wrong
    length, or do not fit together."""
    arrays = map_arrays(path)
    offsets = {m.offset_column for m in MEMBERS}
    due = {m.offset_column for m in MEMBERS if not m.optional}
    due |= {f.name for f in fields(Table)} - {"offset"}
    if wrong := due - set(arrays) | set(arrays) - due - offsets:
        raise DataError(f"{path} has missing or unknown arrays {sorted(wrong)}: build it again")
    table = Table(
        offset={m.name: arrays[m.offset_column] for m in MEMBERS if m.offset_column in arrays},
        **{name: array for name, array in arrays.items() if name not in offsets},
    )
    images, sentences = len(table.image_objects), len(table.sentence_source)
    lengths = {
        **dict.fromkeys(sorted(offsets & set(arrays)), images),
        "record_size": images,
        "image_sentences": images + 1,
        "token_start": sentences + 1,
        "answer_start": sentences + 1,
        "answer_score": len(table.answer_id),
    }
    for name, length in lengths.items():
        if arrays[name].shape != (length,):
            raise DataError(
                f"{path}: {name} has shape {arrays[name].shape}, not ({length},): build it again"
            )
    ends = [
        (table.image_sentences, sentences),
        (table.token_start, len(table.tokens)),
        (table.answer_start, len(table.answer_id)),
    ]
    for start, end in ends:
        if start[0] != 0 or start[-1] != end or bool(np.any(np.diff(start) < 0)):
            raise DataError(f"{path}: ranges do not rise from 0 to the end: build it again")
    return table
