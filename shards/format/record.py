"""The image record: what every source yields and `build` writes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.manifest import Schema

# The QA sets of LXMERT: their sentences are questions, with or without answers.
QA_SOURCES = frozenset({"vqa", "gqa", "vgqa"})


@dataclass(frozen=True)
class Sentence:
    """text, source set, optional answers {answer: score in (0, 1]}, optional question id."""

    text: str
    source: str
    answers: Mapping[str, float] | None = None
    id: str | int | None = None


@dataclass(frozen=True)
class Labels:
    """The detector's labels of n objects: 0-based ids i32[n] and their confidences f32[n]."""

    object_id: NDArray[np.int32]
    object_conf: NDArray[np.float32]
    attribute_id: NDArray[np.int32]
    attribute_conf: NDArray[np.float32]


@dataclass(frozen=True)
class ImageRecord:
    """One image: n objects with features of width D, and all its sentences.

    image: its id in the source; width, height: pixels
    boxes: f32 (n, 4), x1 y1 x2 y2 over width and height, 0..1; features: f16 (n, D)
    """

    image: str
    width: int
    height: int
    boxes: NDArray[np.float32]
    features: NDArray[np.float16]
    sentences: tuple[Sentence, ...]
    labels: Labels | None = None
    split: str | None = None


@dataclass
class Report:
    """What a source or a build left out, and why: counted by reason, with the first few cases."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        shown = self.examples.setdefault(reason, [])
        if len(shown) < 5:
            shown.append(example)

    def lines(self) -> list[str]:
        return [
            f"{reason}: {count} (first: {'; '.join(self.examples[reason])})"
            for reason, count in self.counts.items()
        ]


def record_key(image: str) -> str:
    """The image id as the base name of tar members.

    Letters, digits, `-` and `_` stay; every other byte of the UTF-8 text becomes `=` and two hex
    digits (webdataset splits a name at its first `.`, a tar at `/`). A result above 80 characters
    is cut to 47, `==` and 31 hex digits of the id's sha256, as USTAR names hold 100. The id itself
    is in the record's JSON.
    """
    key = re.sub(
        rb"[^A-Za-z0-9_-]", lambda m: b"=%02X" % m[0][0], image.encode("utf-8", "surrogateescape")
    ).decode("ascii")
    if len(key) > 80:
        key = f"{key[:47]}=={hashlib.sha256(image.encode()).hexdigest()[:31]}"
    return key


def record_json(record: ImageRecord) -> bytes:
    """The JSON member of a record; equal records give equal bytes."""
    sentences = []
    for s in record.sentences:
        entry: dict[str, Any] = {"text": s.text, "source": s.source}
        if s.id is not None:
            entry["id"] = s.id
        if s.answers is not None:
            entry["answers"] = dict(s.answers)
        sentences.append(entry)
    document: dict[str, Any] = {
        "image": record.image,
        "width": record.width,
        "height": record.height,
        "num_objects": len(record.boxes),
        "sentences": sentences,
    }
    if record.split is not None:
        document["split"] = record.split
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def labels_bytes(labels: Labels) -> bytes:
    """Object ids i32 | object confidences f32 | attribute ids i32 | attribute confidences f32."""
    columns = (
        labels.object_id.astype("<i4"),
        labels.object_conf.astype("<f4"),
        labels.attribute_id.astype("<i4"),
        labels.attribute_conf.astype("<f4"),
    )
    return b"".join(c.tobytes() for c in columns)


def labels_from_bytes(payload: bytes, objects: int) -> Labels:
    """The inverse of `labels_bytes`; ValueError where the length is wrong."""
    if len(payload) != 16 * objects:
        raise ValueError(f"{len(payload)} bytes of labels for {objects} objects")
    rows = [payload[4 * objects * i : 4 * objects * (i + 1)] for i in range(4)]
    return Labels(
        np.frombuffer(rows[0], "<i4"),
        np.frombuffer(rows[1], "<f4"),
        np.frombuffer(rows[2], "<i4"),
        np.frombuffer(rows[3], "<f4"),
    )


def check_sentence(entry: object, where: str, default_source: str | None = None) -> Sentence:
    """A sentence from JSON {"text", "source", "answers"?, "id"?}; DataError names `where`."""
    if not isinstance(entry, dict):
        raise DataError(f'{where} is not an object {{"text", "source", …}}')
    if unknown := set(entry) - {"text", "source", "answers", "id"}:
        raise DataError(f"{where} has an unknown key {sorted(unknown)[0]!r}")
    text, source = entry.get("text"), entry.get("source", default_source)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} has no text")
    if not isinstance(source, str) or not source:
        raise DataError(f"{where} has no source (the name of its set, as in vqa or coco_cap)")
    number = entry.get("id")
    if number is not None and (isinstance(number, bool) or not isinstance(number, str | int)):
        raise DataError(f"{where}: id {number!r:.40} is neither a string nor an integer")
    answers = entry.get("answers")
    return Sentence(
        text, source, None if answers is None else check_answers(answers, where), number
    )


def check_answers(answers: object, where: str) -> dict[str, float]:
    """{answer: score in 0..1} from parsed JSON, without zero scores; DataError names `where`."""
    if not isinstance(answers, dict):
        raise DataError(f"{where}: answers are not an object {{answer: score}}")
    out = {}
    for answer, score in answers.items():
        good = isinstance(score, int | float) and not isinstance(score, bool)
        if not good or not math.isfinite(score) or not 0 <= score <= 1:
            raise DataError(
                f"{where}: the score of answer {answer!r:.40} is {score!r:.40}, not 0..1"
            )
        if score > 0:
            out[answer] = score
    return out


def check_record(record: ImageRecord, schema: Schema) -> None:
    """DataError naming the image when a record does not keep to the schema."""
    n = len(record.boxes)
    problem = None
    if record.width < 1 or record.height < 1:
        problem = f"a size of {record.width} × {record.height}"
    elif not 1 <= n <= schema.max_objects:
        problem = f"{n} objects"
    elif record.boxes.dtype != np.float32 or record.boxes.shape != (n, 4):
        problem = f"boxes of shape {record.boxes.shape} and type {record.boxes.dtype}"
    elif not (np.isfinite(record.boxes).all() and _in_image(record)):
        problem = "boxes outside of 0..1 or with x2 < x1 or y2 < y1"
    elif record.features.dtype != np.float16 or record.features.shape != (n, schema.feature_dim):
        problem = (
            f"features of shape {record.features.shape} and type {record.features.dtype} where "
            f"({n}, {schema.feature_dim}) float16 is due"
        )
    elif not np.isfinite(record.features).all():
        problem = "features that are not finite in float16"
    elif (record.labels is not None) != schema.labels:
        problem = "labels where others have none" if record.labels else "no labels, others have"
    elif record.labels is not None:
        problem = _label_problem(record, schema)
    if not problem and not record.sentences:
        problem = "no sentence"
    if not problem and not all(s.text.strip() and s.source for s in record.sentences):
        problem = "a sentence without text or source"
    if problem:
        raise DataError(f"image {record.image!r:.120} has {problem}: correct its source")


def _in_image(record: ImageRecord) -> bool:
    b = record.boxes
    ordered = (b[:, 0] <= b[:, 2]).all() and (b[:, 1] <= b[:, 3]).all()
    return bool(ordered and (b >= 0).all() and (b <= 1).all())


def _label_problem(record: ImageRecord, schema: Schema) -> str | None:
    assert record.labels is not None
    kinds = (
        ("object", record.labels.object_id, record.labels.object_conf, schema.num_object_classes),
        (
            "attribute",
            record.labels.attribute_id,
            record.labels.attribute_conf,
            schema.num_attribute_classes,
        ),
    )
    for name, ids, confidences, classes in kinds:
        if len(ids) != len(record.boxes) or len(confidences) != len(record.boxes):
            return f"{len(ids)} {name} labels for {len(record.boxes)} objects"
        if ids.min() < 0 or ids.max() >= classes:
            return f"an {name} id outside of 0..{classes - 1}"
        if not (np.isfinite(confidences).all() and (confidences >= 0).all()):
            return f"an {name} confidence that is negative or not finite"
        if (confidences > 1.001).any():
            return f"an {name} confidence above 1"
    return None
