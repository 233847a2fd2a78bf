"""The image record: what every source yields and `build` writes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError

# The QA sets of LXMERT: their sentences are questions, with or without answers.
QA_SOURCES = frozenset({"vqa", "gqa", "vgqa"})


@dataclass(frozen=True)
class Sentence:
    """A sentence of an image."""

    text: str
    source: str
    """Its set: vqa, coco_cap, …"""
    answers: Mapping[str, float] | None = None
    """Answer -> score in (0, 1]."""
    id: str | int | None = None
    """Of the question, in its set."""
    kind: str | None = None
    """Of the question or its answer, as its set has them: `what color`, `compare`, …"""


@dataclass(frozen=True)
class Labels:
    """The detector's labels of n objects: 0-based ids, and how sure of each it was."""

    object_id: NDArray[np.int32]
    object_conf: NDArray[np.float32]
    attribute_id: NDArray[np.int32]
    attribute_conf: NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """One of the two images that a record is of."""

    image: str
    """Its id in the source."""
    width: int
    """In pixels."""
    height: int


@dataclass(frozen=True)
class ImageRecord:
    """One image: n objects with features of width D, and all its sentences. Or two images whose
    sentences are about both: n objects are then those of the first, and behind them the second's.

    How its arrays are written is in `shards.format.members`.
    """

    image: str
    """Its id in the source; of two images their common one."""
    width: int
    """In pixels; of two images the first's."""
    height: int
    boxes: NDArray[np.float32]
    """(n, 4): x1 y1 x2 y2 over width and height, 0..1."""
    features: NDArray[np.floating] | NDArray[np.uint8]
    """(n, D), or as they are stored (features.py)."""
    sentences: tuple[Sentence, ...]
    labels: Labels | None = None
    split: str | None = None
    """Of the source: train, val, …"""
    sides: NDArray[np.uint8] | None = None
    """(n,): 0 for objects of the first of two images, 1 for the second's; None: there is one."""
    pictures: tuple[Picture, ...] = ()
    """The two images."""


@dataclass
class Report:
    """What a source or a build left out, by reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few cases of each reason."""
    notes: list[str] = field(default_factory=list)
    """What else there is to say."""

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
    document: dict[str, Any] = {
        "image": record.image,
        "width": record.width,
        "height": record.height,
        "num_objects": len(record.boxes),
        "sentences": [sentence_entry(s) for s in record.sentences],
    }
    if record.split is not None:
        document["split"] = record.split
    if record.pictures:
        document["pictures"] = [asdict(picture) for picture in record.pictures]
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def sentence_entry(sentence: Sentence) -> dict[str, Any]:
    """A sentence as a record's JSON has it."""
    entry: dict[str, Any] = {"text": sentence.text, "source": sentence.source}
    if sentence.id is not None:
        entry["id"] = sentence.id
    if sentence.kind is not None:
        entry["kind"] = sentence.kind
    if sentence.answers is not None:
        entry["answers"] = dict(sentence.answers)
    return entry


def record_of(
    document: Mapping[str, Any], sentences: Sequence[Sentence], arrays: Mapping[str, Any]
) -> ImageRecord:
    """The record whose JSON is parsed; arrays: its other members by name. KeyError or TypeError
    where the JSON lacks something."""
    return ImageRecord(
        image=document["image"],
        width=document["width"],
        height=document["height"],
        sentences=tuple(sentences),
        split=document.get("split"),
        pictures=tuple(Picture(**picture) for picture in document.get("pictures", ())),
        **arrays,
    )


def check_sentence(entry: object, where: str, default_source: str | None = None) -> Sentence:
    """A sentence of a record's JSON (`sentence_entry`); DataError names `where` it is."""
    if not isinstance(entry, dict):
        raise DataError(f'{where} is not an object {{"text", "source", …}}')
    if unknown := set(entry) - {"text", "source", "answers", "id", "kind"}:
        raise DataError(f"{where} has an unknown key {sorted(unknown)[0]!r}")
    text, source = entry.get("text"), entry.get("source", default_source)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} has no text")
    if not isinstance(source, str) or not source:
        raise DataError(f"{where} has no source (the name of its set, as in vqa or coco_cap)")
    number = entry.get("id")
    if number is not None and (isinstance(number, bool) or not isinstance(number, str | int)):
        raise DataError(f"{where}: id {number!r:.40} is neither a string nor an integer")
    answers, kind = entry.get("answers"), entry.get("kind")
    if kind is not None and (not isinstance(kind, str) or not kind):
        raise DataError(f"{where}: the kind {kind!r:.40} is no name")
    found = None if answers is None else check_answers(answers, where)
    return Sentence(text, source, found, number, kind)


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
