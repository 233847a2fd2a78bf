"""Whether an image record keeps to its data set's schema."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.features import as_numbers, beyond_uint8
from shards.format.manifest import Schema
from shards.format.members import FEATURES, MEMBERS, members_of
from shards.format.record import ImageRecord, Labels


def check_record(record: ImageRecord, schema: Schema) -> None:
    """DataError naming the image when a record does not keep to the schema."""
    problem = (
        _size_problem(record, schema)
        or _shape_problem(record, schema)
        or _value_problem(record, schema)
        or (_label_problem(record.labels, schema) if record.labels else None)
        or _sentence_problem(record)
    )
    if problem:
        raise DataError(f"image {record.image!r:.120} has {problem}: correct its source")


def _size_problem(record: ImageRecord, schema: Schema) -> str | None:
    if record.width < 1 or record.height < 1:
        return f"a size of {record.width} × {record.height}"
    if not 1 <= len(record.boxes) <= schema.max_objects:
        return f"{len(record.boxes)} objects"
    return None


def _shape_problem(record: ImageRecord, schema: Schema) -> str | None:
    """Members that are absent or too many, and arrays of another shape or type."""
    due = {member.name: member for member in members_of(schema)}
    for member in MEMBERS:
        if not member.columns:
            continue
        there = getattr(record, member.name) is not None
        if there != (member.name in due):
            name = member.name
            return f"{name} where others have none" if there else f"no {name}, others have"
        if not there:
            continue
        member = due[member.name]
        for column, array in zip(member.columns, member.arrays(record), strict=True):
            shape, kind = (len(record.boxes), *column.row_shape(schema)), np.dtype(column.type)
            # What a build has not stored yet; fp16 has to be made where it can be refused.
            numbers = (len(record.boxes), schema.feature_dim)
            raw = member.name == FEATURES.name and schema.feature_type != "fp16"
            if raw and array.shape == numbers and array.dtype in ("f2", "f4"):
                continue
            if array.shape != shape or array.dtype != kind:
                return (
                    f"{column.name} of shape {array.shape} and type {array.dtype} where {shape} "
                    f"{kind} is due"
                )
    return None


def _value_problem(record: ImageRecord, schema: Schema) -> str | None:
    if problem := _sides_problem(record):
        return problem
    if not (np.isfinite(record.boxes).all() and _in_image(record.boxes)):
        return "boxes outside of 0..1 or with x2 < x1 or y2 < y1"
    features = as_numbers(record.features)
    if not np.isfinite(features).all():
        return "features that are not finite"
    to_store = schema.feature_type == "uint8" and record.features.dtype != np.uint8
    if to_store and beyond_uint8(features).any():
        return "features beyond ±1.7e38, which uint8 cannot hold"
    return None


def _sides_problem(record: ImageRecord) -> str | None:
    sides, pictures = record.sides, record.pictures
    if sides is None:
        return "two pictures, but does not say which object is of which" if pictures else None
    if len(pictures) != 2:
        return f"objects of two pictures, but names {len(pictures)}"
    if min(p.width for p in pictures) < 1 or min(p.height for p in pictures) < 1:
        return "a picture without a size"
    if sides[0] != 0 or sides[-1] != 1 or bool((np.diff(sides.astype(int)) < 0).any()):
        return "objects that are not those of the first picture and then those of the second"
    return None


def _in_image(boxes: NDArray[np.float32]) -> bool:
    ordered = (boxes[:, 0] <= boxes[:, 2]).all() and (boxes[:, 1] <= boxes[:, 3]).all()
    return bool(ordered and (boxes >= 0).all() and (boxes <= 1).all())


def _label_problem(labels: Labels, schema: Schema) -> str | None:
    for name, ids, confidences, classes in (
        ("object", labels.object_id, labels.object_conf, schema.num_object_classes),
        ("attribute", labels.attribute_id, labels.attribute_conf, schema.num_attribute_classes),
    ):
        if ids.min() < 0 or ids.max() >= classes:
            return f"an {name} id outside of 0..{classes - 1}"
        if not (np.isfinite(confidences).all() and (confidences >= 0).all()):
            return f"an {name} confidence that is negative or not finite"
        if (confidences > 1.001).any():
            return f"an {name} confidence above 1"
    return None


def _sentence_problem(record: ImageRecord) -> str | None:
    if not record.sentences:
        return "no sentence"
    if not all(s.text.strip() and s.source for s in record.sentences):
        return "a sentence without text or source"
    return None
