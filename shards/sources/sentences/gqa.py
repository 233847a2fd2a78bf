"""GQA's questions: `{"02930152": {"question": …, "imageId": "2354786", "answer": "no", …}, …}`.

Ids of questions are strings with leading zeros, and stay so. Test sets have no answers. The kind of
a question is its structural type (`types`), if it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.errors import DataError
from shards.format.record import Report, Sentence
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head, pairs
from shards.sources.texts import ImageText, SentenceFormat


def _detect(path: Path) -> bool:
    begin = head(path)
    return begin.lstrip()[:1] == b"{" and b'"imageId"' in begin and b'"question"' in begin


def _read(files: Sequence[Path], source: str, report: Report) -> Iterator[ImageText]:
    for path in files:
        for number, entry in pairs(path, "file of questions"):
            found = entry if isinstance(entry, dict) else {}
            text, image, answer = (found.get(k) for k in ("question", "imageId", "answer"))
            if not isinstance(text, str) or not isinstance(image, str):
                raise DataError(f"{path}: question {number:.40} has no question and imageId")
            if not isinstance(answer, str | None):
                raise DataError(
                    f"{path}: the answer of question {number:.40} is {answer!r:.40}, no text"
                )
            if not text.strip():
                report.add("empty sentences", f"{path}, question {number}")
                continue
            answers = {answer: 1.0} if answer else None
            types = found.get("types")
            kind = types.get("structural") if isinstance(types, dict) else None
            kind = kind if isinstance(kind, str) and kind else None
            sentence = Sentence(text.strip(), source, answers, number, kind)
            yield ImageText(image_id(image, "vg"), (sentence,))


FORMAT = SentenceFormat(
    name="gqa",
    help="GQA's questions (train_balanced_questions.json)",
    source="gqa",
    detect=_detect,
    read=_read,
)
