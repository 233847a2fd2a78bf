"""Tables: named arrays in a safetensors file, memory-mapped without a copy."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError

I64 = NDArray[np.int64]

# Names of the safetensors format for the types that we write; the bytes are little endian.
_TYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
_NAMES = {np.dtype(code): name for name, code in _TYPES.items()}


@dataclass(frozen=True)
class Table:
    """What a shard holds: I images, S sentences grouped by image in image order, T tokens.

    image_objects i32[I]: number of objects of an image
    features_offset, boxes_offset, record_offset, labels_offset i64[I]: bytes from the start of
    the tar to the payload (labels only where the data set has them, else None)
    record_size i64[I]: bytes of the JSON payload
    image_sentences i64[I+1]: range of an image's sentences
    sentence_source u8[S]: index into the manifest's sources
    token_start i64[S+1], tokens u16[T] or u32[T]: WordPiece ids without [CLS] and [SEP]
    answer_start i64[S+1], answer_id i32[A], answer_score f32[A]: answers of the answer table
    """

    image_objects: NDArray[np.int32]
    features_offset: I64
    boxes_offset: I64
    record_offset: I64
    record_size: I64
    image_sentences: I64
    sentence_source: NDArray[np.uint8]
    token_start: I64
    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    answer_start: I64
    answer_id: NDArray[np.int32]
    answer_score: NDArray[np.float32]
    labels_offset: I64 | None = None


def save_arrays(path: str | Path, arrays: Mapping[str, NDArray]) -> None:
    """Write arrays as a safetensors file: the same arrays give the same bytes.

    The library's own writer copies every array and makes files that others may not read (0600).
    """
    # Widest types first, so that every array is aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, at = {}, 0
    for name in order:
        array = arrays[name]
        kind = _NAMES[array.dtype.newbyteorder("<")]
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = arrays[name]
            array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tofile(f)
        f.flush()
        os.fsync(f.fileno())


def map_arrays(path: str | Path) -> dict[str, NDArray]:
    """Read-only views into the memory-mapped file; DataError naming it when it is not whole.

    The library's own reader copies every array, which tables of gigabytes cannot afford.
    """
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        header_size = int(mapped[:8].view("<u8")[0])
        header = json.loads(mapped[8 : 8 + header_size].tobytes())
        header.pop("__metadata__", None)
        data = mapped[8 + header_size :]
        arrays, covered = {}, 0
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = np.dtype(_TYPES[entry["dtype"]])
            if not 0 <= begin <= end <= len(data):
                raise ValueError(f"{name} lies outside of the file")
            view = np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, begin)
            arrays[name] = view.reshape(entry["shape"])
            covered += end - begin
        if covered != len(data):
            raise ValueError(f"{len(data)} bytes of data where the arrays have {covered}")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise DataError(f"{path} is not a whole table: {error}; fetch or build it again") from None
    return arrays


def open_table(path: str | Path) -> Table:
    """Map a shard's table. Raises DataError naming the file when arrays are absent or of a wrong
    type or length."""
    arrays = map_arrays(path)
    names = {f.name for f in fields(Table)}
    if wrong := (names - {"labels_offset"}) - set(arrays) | (set(arrays) - names):
        raise DataError(f"{path} has missing or unknown arrays {sorted(wrong)}: build it again")
    table = Table(**arrays)
    images, sentences = len(table.image_objects), len(table.sentence_source)
    lengths = {
        "features_offset": images,
        "boxes_offset": images,
        "labels_offset": images,
        "record_offset": images,
        "record_size": images,
        "image_sentences": images + 1,
        "token_start": sentences + 1,
        "answer_start": sentences + 1,
        "answer_score": len(table.answer_id),
    }
    for name, length in lengths.items():
        if name in arrays and arrays[name].shape != (length,):
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
