"""Tars that others wrote, used as they are: where the members of an image record are in them.

A sample can be used in place where it has the JSON of a record, and each array either as our own
raw file (`features.f16`) or as a .npy of the same type in C order (`features.npy`), whose values
lie behind a header of its own. They may come in any order, with other members between them.
`lxscale shards index` writes tables of such tars, and `verify` scans them once more.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.check import check_record
from shards.format.manifest import Schema
from shards.format.members import BOXES, FEATURES, LABELS, RECORD, SIDES, Member, members_of
from shards.format.record import check_sentence, record_json, record_of
from shards.format.sentences import Document
from shards.format.table import member_columns
from shards.sources import tars
from shards.sources.checks import PartError

REMEDY = "it cannot be used in place; `lxscale shards build` reads such tars and writes others"


@dataclass
class Scanned:
    """What a tar has, an entry a sample that can be used in place."""

    objects: list[int] = field(default_factory=list)
    record_size: list[int] = field(default_factory=list)
    """Bytes of the JSON."""
    sample_offset: list[int] = field(default_factory=list)
    """Bytes from the start of the tar to its first header."""
    offset: dict[str, list[int]] = field(default_factory=dict)
    """Member -> bytes from the start of the tar to its values."""
    documents: list[Document] = field(default_factory=list)
    """The JSON as a build would write it, parsed."""
    left_out: list[str] = field(default_factory=list)
    """The keys of samples without sentences."""

    def columns(self) -> dict[str, NDArray]:
        """The arrays of a table that say where members are."""
        return {
            **member_columns(self.objects, self.record_size, self.offset),
            "sample_offset": np.asarray(self.sample_offset, dtype=np.int64),
        }


def scan(f: IO[bytes], schema: Schema, url: str) -> Scanned:
    """What an open tar has. No more than one sample is in memory, and all JSON.

    DataError naming tar, key and member where one cannot be used in place, and where the tar is
    damaged.
    """
    out = Scanned(offset={member.name: [] for member in members_of(schema)})
    for sample in _samples(f, schema, url):
        try:
            document = parse_document(sample.members.get(RECORD.suffix))
            if document["sentences"]:
                _add(out, sample, document, schema)
            else:
                out.left_out.append(sample.key)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _refusal(url, sample, error) from None
    return out


def guess(f: IO[bytes], schema: Schema, url: str) -> Schema:
    """The schema with what the first sample of an open tar says of it: the width of features, and
    labels or none. DataError as `scan`."""
    member = next(m for m in members_of(schema) if m.name == FEATURES.name)
    value = np.dtype(member.columns[0].type).itemsize
    for sample in _samples(f, replace(schema, labels=True, sides=True), url):
        try:
            boxes = _values(sample, BOXES, schema)
            features = _values(sample, member, schema)
            objects = len(boxes.payload) // BOXES.object_bytes(schema)
            if not objects or len(features.payload) % (objects * value):
                size = len(features.payload)
                raise PartError(features.name, f"{size} bytes are no rows of {objects} objects")
            labels = LABELS.suffix in sample.members
            return replace(
                schema,
                feature_dim=len(features.payload) // (objects * value),
                labels=labels,
                sides=SIDES.suffix in sample.members,
                num_object_classes=schema.num_object_classes if labels else 0,
                num_attribute_classes=schema.num_attribute_classes if labels else 0,
            )
        except ValueError as error:
            raise _refusal(url, sample, error) from None
    raise DataError(f"{url} has no sample of a record: name tars that have")


def parse_document(text: bytes | None) -> dict[str, Any]:
    """The JSON of a record that others wrote; ValueError, KeyError or the like where it lacks what
    is read of it."""
    if text is None:
        raise ValueError(f"it has no {RECORD.suffix}")
    document = json.loads(text)
    if not isinstance(document, dict):
        raise PartError(RECORD.suffix, "it is no object")
    if not isinstance(document.get("image"), str) or not document["image"]:
        raise PartError(RECORD.suffix, 'it has no "image", the id of the image')
    for name in ("width", "height"):
        if type(document.get(name)) is not int or not 1 <= document[name] < 1 << 31:
            raise PartError(RECORD.suffix, f'its "{name}" is no number of pixels')
    if not isinstance(document.get("sentences"), list):
        raise PartError(RECORD.suffix, 'it has no "sentences"')
    if not isinstance(document.get("split"), str | None):
        raise PartError(RECORD.suffix, 'its "split" is no name')
    return document


# --- a sample -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Values:
    """The values of a member."""

    name: str
    """Suffix of their file."""
    offset: int
    """Bytes from the start of the tar."""
    payload: bytes


def _samples(f: IO[bytes], schema: Schema, url: str) -> Iterator[tars.Sample]:
    members = members_of(schema)
    wanted = {m.suffix for m in members} | {_npy_name(m) for m in members}
    try:
        yield from tars.samples(f, wanted.__contains__)
    except tars.TarError as error:
        raise DataError(f"{url}: {error}; copy it again") from None


def _refusal(url: str, sample: tars.Sample, error: Exception) -> DataError:
    member = f", {error.part}" if isinstance(error, PartError) else ""
    text = sample.problem or str(error)
    return DataError(f"{url}, {sample.key}{member}: {text}: {REMEDY}")


def _npy_name(member: Member) -> str:
    return f"{member.name}.npy"


def _add(out: Scanned, sample: tars.Sample, document: dict[str, Any], schema: Schema) -> None:
    """Add a sample; ValueError where it cannot be used in place."""
    if sample.problem:
        raise ValueError(sample.problem)
    offset = {RECORD.name: sample.places[RECORD.suffix]}
    fields: dict[str, Any] = {}
    boxes = _values(sample, BOXES, schema)
    objects = len(boxes.payload) // BOXES.object_bytes(schema)
    if document.get("num_objects", objects) != objects:
        raise PartError(RECORD.suffix, f"num_objects is not {objects}, as the boxes are")
    for member in members_of(schema):
        if member is RECORD:
            continue
        values = _values(sample, member, schema)
        try:
            fields[member.name] = member.value(values.payload, objects, schema)
        except ValueError as error:
            raise PartError(values.name, str(error)) from None
        offset[member.name] = values.offset
    inside = (fields[BOXES.name] >= 0) & (fields[BOXES.name] <= 1)
    if not inside.all():
        raise PartError(boxes.name, "boxes are not in 0..1 of width and height")
    sentences = [
        check_sentence(s, f"{RECORD.suffix}, sentence {i}")
        for i, s in enumerate(document["sentences"])
    ]
    record = record_of(document, sentences, fields)
    check_record(record, schema)
    out.documents.append(json.loads(record_json(record)))
    out.objects.append(objects)
    out.record_size.append(len(sample.members[RECORD.suffix]))
    out.sample_offset.append(sample.offset)
    for name, begin in offset.items():
        out.offset[name].append(begin)


def _values(sample: tars.Sample, member: Member, schema: Schema) -> _Values:
    """The values of a member; PartError where they are not there as a batch reads them."""
    if member.suffix in sample.members:
        return _Values(member.suffix, sample.places[member.suffix], sample.members[member.suffix])
    name = _npy_name(member)
    if name not in sample.members or len(member.columns) != 1:
        either = f" or {name}" if len(member.columns) == 1 else ""
        raise ValueError(f"it has no {member.suffix}{either}")
    payload, column = sample.members[name], member.columns[0]
    f = io.BytesIO(payload)
    try:
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(f)]
        shape, fortran, dtype = header(f)
    except Exception as error:  # parsers of strangers' data may raise anything
        raise PartError(name, f"it is no .npy ({error})") from None
    if dtype != np.dtype(column.type):
        raise PartError(name, f"its values are {dtype} where {np.dtype(column.type)} are due")
    if fortran or len(shape) != 1 + len(column.row):
        raise PartError(name, f"its shape is {shape}, or not a row an object (C order)")
    if len(payload) - f.tell() != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise PartError(name, f"its values are not of shape {shape}")
    return _Values(name, sample.places[name] + f.tell(), payload[f.tell() :])
