"""The members of an image record in its tar: one table, which everything that touches them follows.

A record is the files `<key>.<suffix>` of MEMBERS, in this order and with nothing between them. The
first is its JSON; the others hold values of each object. What `build` appends, the offsets in a
shard's table, what `verify` expects and what a batch gathers all come from here: a new member is a
row of the table and a field of `ImageRecord`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.format.features import FeatureType, to_uint8
from shards.format.manifest import Schema
from shards.format.record import ImageRecord, Labels


@dataclass(frozen=True)
class Column:
    """An array of a member, with a row for each object."""

    name: str
    type: str
    """NumPy's name of the element type; bytes are little-endian."""
    row: tuple[int | str, ...] = ()
    """Shape of an object's values; a name stands for that number in the schema."""

    def row_shape(self, schema: Schema | None) -> tuple[int, ...]:
        return tuple(getattr(schema, n) if isinstance(n, str) else n for n in self.row)


@dataclass(frozen=True)
class Member:
    """One file of a record: its columns, each for all objects, one column after the other."""

    name: str
    """`<name>_offset` in a shard's table says where payloads begin. Members with columns are fields
    of this name in an `ImageRecord`."""
    suffix: str
    columns: tuple[Column, ...] = ()
    """Elements of all columns have the same size, so that each column is aligned as the first. A
    member without columns is the JSON, whose length is in the table."""
    holder: type | None = None
    """The class with the columns as fields; None where the only column is the field itself."""
    optional: bool = False
    """Only some data sets have it: those whose schema has a true field of its name."""

    @property
    def offset_column(self) -> str:
        return f"{self.name}_offset"

    def object_bytes(self, schema: Schema | None) -> int:
        """Bytes that an object takes in the payload."""
        return sum(np.dtype(c.type).itemsize * math.prod(c.row_shape(schema)) for c in self.columns)

    def arrays(self, record: ImageRecord) -> list[NDArray]:
        """The columns of a record that has this member."""
        value = getattr(record, self.name)
        return [getattr(value, c.name) for c in self.columns] if self.holder else [value]

    def payload(self, record: ImageRecord) -> bytes:
        """The file's content for a record that has this member, which has columns."""
        parts = []
        for column, array in zip(self.columns, self.arrays(record), strict=True):
            if self.name == FEATURES.name and column.type == "u1" and array.dtype.kind == "f":
                array = to_uint8(array)
            parts.append(array.astype(column.type, copy=False).tobytes())
        return b"".join(parts)

    def value(self, payload: bytes, objects: int, schema: Schema | None = None) -> Any:
        """The inverse of `payload`: the record's field; ValueError where the length is wrong.
        Without a schema for members whose columns name nothing in one."""
        if len(payload) != objects * self.object_bytes(schema):
            raise ValueError(f"{len(payload)} bytes of {self.name} for {objects} objects")
        arrays, at = [], 0
        for column in self.columns:
            row = column.row_shape(schema)
            count = objects * math.prod(row)
            array = np.frombuffer(payload, column.type, count, at)
            arrays.append(array.reshape(objects, *row))
            at += array.nbytes
        return self.holder(*arrays) if self.holder else arrays[0]


RECORD = Member("record", "json")
BOXES = Member("boxes", "boxes.f32", (Column("boxes", "<f4", (4,)),))
LABELS = Member(
    "labels",
    "labels.bin",
    (
        Column("object_id", "<i4"),
        Column("object_conf", "<f4"),
        Column("attribute_id", "<i4"),
        Column("attribute_conf", "<f4"),
    ),
    holder=Labels,
    optional=True,
)
SIDES = Member("sides", "sides.u8", (Column("sides", "u1"),), optional=True)
FEATURES = Member("features", "features.f16", (Column("features", "<f2", ("feature_dim",)),))

MEMBERS = (RECORD, BOXES, LABELS, SIDES, FEATURES)

FEATURES_OF: dict[FeatureType, Member] = {
    "fp16": FEATURES,
    "fp32": Member("features", "features.f32", (Column("features", "<f4", ("feature_dim",)),)),
    "uint8": Member("features", "features.u8", (Column("features", "u1", ("stored_width",)),)),
}
"""The member with the features, by how they are stored (features.py)."""


def members_of(schema: Schema) -> list[Member]:
    """The members of every record of a data set, in the order of its tars."""
    there = [m for m in MEMBERS if not m.optional or getattr(schema, m.name)]
    return [FEATURES_OF[schema.feature_type] if m is FEATURES else m for m in there]


def has_member(schema: Schema, member: Member) -> bool:
    """Whether records of a data set have a member of that name."""
    return any(m.name == member.name for m in members_of(schema))
