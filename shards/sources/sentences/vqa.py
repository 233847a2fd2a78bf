"""VQA v2: files of questions, and of annotations with ten people's answers to each.

    {"questions":   [{"question_id": 1, "image_id": 318556, "question": "What is …?"}, …]}
    {"annotations": [{"question_id": 1, "answers": [{"answer": "red"}, …],
                      "question_type": "what is"}, …]}                 (its kind, if it is there)

They belong together by question id, wherever each is. Questions without annotations (test sets)
have no answers. Scores are the official soft ones (`shards.sources.vqa_rules`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.format.record import Report, Sentence
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head, list_items
from shards.sources.texts import ImageText, SentenceFormat
from shards.sources.vqa_rules import scores


def _detect(path: Path) -> bool:
    begin = head(path)
    lists = b'"questions"' in begin or b'"annotations"' in begin
    return begin.lstrip()[:1] == b"{" and lists and b'"question_id"' in begin


def _read(files: Sequence[Path], source: str, report: Report) -> Iterator[ImageText]:
    questions = [path for path in files if b'"questions"' in _head(path)]
    answers = _answers([path for path in files if path not in questions])
    if not questions:
        raise DataError(
            f"{', '.join(map(str, files))}: annotations without their questions: name those, too"
        )
    annotated, used, seen = bool(answers), 0, set[int]()
    for path in questions:
        for i, entry in list_items(path, "file of questions", "questions"):
            number, image, text = _fields(entry, ("question_id", "image_id", "question"))
            if type(number) is not int or type(image) is not int or not isinstance(text, str):
                raise DataError(f"{path}: question {i} has no question_id, image_id and question")
            if number in seen:
                raise DataError(f"{path}: question_id {number} comes twice: name each file once")
            seen.add(number)
            if not text.strip():
                report.add("empty sentences", f"{path}, question {number}")
                continue
            found = answers.pop(number, None)
            used += found is not None
            if annotated and found is None:
                report.add("questions without annotations", f"{path}, question {number}")
            given, kind = (None, None) if found is None else json.loads(found)
            sentence = Sentence(text.strip(), source, given, number, kind)
            yield ImageText(image_id(str(image), "coco"), (sentence,))
    if answers:
        first = next(iter(answers))
        raise DataError(
            f"{len(answers):,} annotations are of questions that are in none of the files (first: "
            f"question_id {first}): name their questions, too"
        )


def _answers(files: Sequence[Path]) -> dict[int, bytes]:
    """Question id → its answers' scores and their kind, as JSON, which takes a part of what objects
    would."""
    out: dict[int, bytes] = {}
    for path in files:
        for i, entry in list_items(path, "file of annotations", "annotations"):
            number, given, kind = _fields(entry, ("question_id", "answers", "question_type"))
            texts = [_fields(a, ("answer",))[0] for a in given] if isinstance(given, list) else []
            if type(number) is not int or not texts or not all(isinstance(t, str) for t in texts):
                raise DataError(f"{path}: annotation {i} has no question_id and answers")
            if number in out:
                raise DataError(f"{path}: question_id {number} has annotations already")
            # The only answer of a single annotator has score 0: nobody else gave it.
            kept = {answer: score for answer, score in scores(texts).items() if score > 0}
            kind = kind if isinstance(kind, str) and kind else None
            out[number] = json.dumps([kept, kind]).encode()
    return out


def _fields(entry: object, names: Sequence[str]) -> tuple[Any, ...]:
    found = entry if isinstance(entry, dict) else {}
    return tuple(found.get(name) for name in names)


def _head(path: Path) -> bytes:
    try:
        return head(path)
    except OSError as error:
        raise DataError(f"cannot read the file of questions {path}: {error.strerror}") from None


FORMAT = SentenceFormat(
    name="vqa",
    help="VQA v2's questions and annotations, named together",
    source="vqa",
    detect=_detect,
    read=_read,
)
