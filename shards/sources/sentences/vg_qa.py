"""Visual Genome's questions: `[{"id": 1, "qas": [{"qa_id", "question", "answer", …}, …]}, …]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.errors import DataError
from shards.format.record import Report, Sentence
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head, list_items
from shards.sources.texts import ImageText, SentenceFormat


def _detect(path: Path) -> bool:
    begin = head(path)
    return begin.lstrip()[:1] == b"[" and b'"qas"' in begin and b'"question"' in begin


def _read(files: Sequence[Path], source: str, report: Report) -> Iterator[ImageText]:
    for path in files:
        for i, entry in list_items(path, "file of questions"):
            image = entry.get("id") if isinstance(entry, dict) else None
            questions = entry.get("qas") if isinstance(entry, dict) else None
            if type(image) is not int or not isinstance(questions, list):
                raise DataError(f'{path}: entry {i} is not an object with "id" and "qas"')
            out = []
            for qa in questions:
                found = qa if isinstance(qa, dict) else {}
                text, answer, number = (found.get(k) for k in ("question", "answer", "qa_id"))
                if not isinstance(text, str) or not isinstance(answer, str):
                    raise DataError(
                        f"{path}: entry {i}, image {image}: a question or answer is missing"
                    )
                if number is not None and type(number) is not int:
                    raise DataError(f"{path}: image {image}: the qa_id {number!r:.40} is no number")
                if text.strip():
                    given = {answer.strip(): 1.0} if answer.strip() else {}
                    out.append(Sentence(text.strip(), source, given, number))
                else:
                    report.add("empty sentences", f"{path}, image {image}")
            if out:
                yield ImageText(image_id(str(image), "vg"), tuple(out))


FORMAT = SentenceFormat(
    name="vg-qa",
    help="Visual Genome's questions and answers (question_answers.json)",
    source="vgqa",
    detect=_detect,
    read=_read,
)
