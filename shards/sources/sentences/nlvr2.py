"""NLVR2's statements, a line of JSON each: `{"identifier": "train-1-0-0", "sentence", "label"}`.

A statement is about two images, `train-1-0-img0` and `…-img1`. They become one record, `train-1-0`,
with all statements about both: the identifier is a statement's id, and its label the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.errors import DataError
from shards.format.record import Report, Sentence
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head
from shards.sources.sentences.rows import json_lines
from shards.sources.texts import ImageText, SentenceFormat

_LABELS = ("True", "False")


def _detect(path: Path) -> bool:
    try:
        first = json.loads(head(path).lstrip().split(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and {"identifier", "sentence"} <= set(first)


def _read(files: Sequence[Path], source: str, report: Report) -> Iterator[ImageText]:
    seen: set[str] = set()
    for path in files:
        for number, entry in json_lines(path, "file of statements"):
            where = f"{path}, line {number}"
            name, text, label = (entry.get(k) for k in ("identifier", "sentence", "label"))
            parts = name.split("-") if isinstance(name, str) else []
            if len(parts) != 4 or not all(parts) or not isinstance(text, str):
                raise DataError(
                    f"{where}: it has no identifier (split-set-pair-sentence) and sentence"
                )
            if name in seen:
                raise DataError(f"{where}: {name!r:.60} comes twice: name each file once")
            seen.add(str(name))
            if label is not None and str(label) not in _LABELS:
                raise DataError(f"{where}: the label is {label!r:.40}, not True or False")
            if not text.strip():
                report.add("empty sentences", where)
                continue
            answers = None if label is None else {str(label): 1.0}
            sentence = Sentence(text.strip(), source, answers, name)
            both = "-".join(parts[:3])
            first, second = (image_id(f"{both}-{side}") for side in ("img0", "img1"))
            yield ImageText(image_id(both), (sentence,), parts[0], (first, second))


FORMAT = SentenceFormat(
    name="nlvr2",
    help="NLVR2's statements (train.json): records of two images",
    source="nlvr2",
    detect=_detect,
    read=_read,
)
