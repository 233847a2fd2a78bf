"""Batches of records out of the tars of shards, no object a record."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shards.format.features import NUMPY
from shards.format.index import DatasetIndex
from shards.format.manifest import Schema
from shards.format.members import FEATURES, FEATURES_OF, RECORD, Member, members_of
from shards.order.draws import I64
from shards.store.prefetch import ShardFiles
from shards.store.reader import Run


def gather_images(
    files: ShardFiles,
    index: DatasetIndex,
    schema: Schema,
    images: I64,
    shards: I64,
    features: NDArray,
) -> dict[str, NDArray]:
    """Copy the features of images, rows of the index that lie in `shards`, into `features`,
    (images, objects, schema.stored_width) of the type that they are stored in, zero-padded.

    Returns the columns of the other members, zero-padded, too: boxes, (images, objects, 4) f32;
    with labels object_id, object_conf, attribute_id, attribute_conf, each (images, objects), i64 or
    f32; of records of two images sides, (images, objects) u8.
    """
    count, objects = features.shape[:2]
    held = index.image_objects[images].astype(np.int64)
    runs: dict[Member, Run] = {}
    for member in members_of(schema):
        if member is not RECORD:
            size = member.object_bytes(schema)
            out = (
                features
                if member.name == FEATURES.name
                else np.empty((count, objects * size), np.uint8)
            )
            runs[member] = Run(index.offset[member.name][images], held * size, out)
    files.read_rows(shards, list(runs.values()))
    found: dict[str, NDArray] = {}
    for member, run in runs.items():
        if member.name != FEATURES.name:
            columns = _columns(member, schema, run.out, held, objects)
            found |= zip((c.name for c in member.columns), columns, strict=True)
    return found


def gather_objects(
    files: ShardFiles, index: DatasetIndex, schema: Schema, images: I64, shards: I64, objects: I64
) -> NDArray:
    """Single objects' features as stored, (n, schema.stored_width): object `objects[i]` of
    `images[i]`, which lies in `shards[i]`."""
    member = FEATURES_OF[schema.feature_type]
    size = member.object_bytes(schema)
    out = np.empty((len(images), schema.stored_width), dtype=NUMPY[schema.feature_type])
    at = index.offset[FEATURES.name][images] + objects * size
    files.read_rows(shards, [Run(at, np.full(len(images), size), out)])
    return out


def gather_bytes(files: ShardFiles, shard: int, at: int, size: int) -> bytes:
    """`size` bytes at `at` of a shard's tar."""
    out = np.empty((1, size), dtype=np.uint8)
    files.read_rows(np.asarray([shard]), [Run(np.asarray([at]), np.asarray([size]), out)])
    return out.tobytes()


def _columns(
    member: Member, schema: Schema, raw: NDArray[np.uint8], held: I64, objects: int
) -> tuple[NDArray, ...]:
    """A member's columns, (images, objects, …), out of its payloads, a row of bytes each, padded
    with zeros from `held` to `objects` objects. Integers become int64, by which torch indexes."""
    even = bool((held == objects).all())
    found: list[NDArray] = []
    first = 0  # elements that an object has in the columns before
    for column in member.columns:
        shape = column.row_shape(schema)
        width = math.prod(shape)
        elements = raw.view(column.type)
        if even or len(member.columns) == 1:
            values = elements[:, first * objects : (first + width) * objects]
        else:
            # Columns lie close together: in each row the next one begins where `held` objects end.
            i = np.arange(objects * width)
            begin = np.arange(len(raw)) * elements.shape[1] + first * held
            values = np.take(elements, begin[:, None] + i)
            values = np.where(i < width * held[:, None], values, 0)
        values = values.reshape(len(raw), objects, *shape)
        wide = np.int64 if values.dtype.kind == "i" else values.dtype
        found.append(np.ascontiguousarray(values, dtype=wide))
        first += width
    return tuple(found)
