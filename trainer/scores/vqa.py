"""VQA v2's accuracy, as https://visualqa.org/evaluation.html and the code that it links to have it.

A prediction scores min(1, n / 3) where n of the others gave it, averaged over the ways to leave one
of the ten annotators out. Which answers are the same:

- Where the annotators' answers differ, theirs and the prediction are compared in their normal form
  (`shards.sources.vqa_rules`).
- Where all gave the same one, that and the prediction are compared as they are, but for line ends,
  tabs and spaces around them: "T-shirt" beside ten "t-shirt" scores 1 only if it is written so.

That is the official code's latest form. Others differ: an earlier form, which took the prediction's
normal form always and the annotators' without number words and articles; and soft targets made of
normal forms alone, LXMERT's among them. Two more differences can hardly be seen: the
official code drops 32 periods of an answer at most, and with one annotator it leaves out all whose
entries equal that one's in all fields, which cannot be where entries are numbered, as published.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from shards.errors import DataError
from shards.sources.json_stream import list_items
from shards.sources.vqa_rules import normal_answer, score
from trainer.scores.predictions import (
    Means,
    Missing,
    Pairs,
    answer_text,
    by_question,
    check_predicted,
    type_name,
)

_normal = lru_cache(maxsize=1 << 16)(normal_answer)


def score_vqa(
    predictions: Pairs[int, str], annotations: Iterable[Path], *, missing: Missing = "error"
) -> dict[str, float]:
    """`accuracy`, and of the questions that have such types `accuracy/number` (answer types:
    yes/no, number, other) and `accuracy/question_type/how many`; fractions, not rounded.

    predictions: answers by question_id. annotations: VQA v2's files of annotations.
    DataError for a question without a prediction (unless `missing` is "zero": then it scores 0),
    with two or unknown, and for files that are not as published.
    """
    given = by_question(predictions)
    means, asked = Means(), dict[int, None]()
    for path in annotations:
        for i, entry in list_items(path, "file of annotations", "annotations"):
            number, answers, types = _annotation(entry, f"{path}: annotation {i}")
            if number in asked:
                raise DataError(f"{path}: question_id {number} comes twice: name each file once")
            asked[number] = None
            if missing == "skip" and number not in given:
                continue
            value = 0.0
            if number in given:
                value = soft_accuracy(answer_text(given[number], number), answers)
            means.add(value, "accuracy", *(f"accuracy/{name}" for name in types))
    check_predicted(given, asked, asked, missing)
    return means.by_name()


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The score of one prediction among the annotators' answers, 0 to 1."""
    found, gave = _bare(prediction), [_bare(answer) for answer in answers]
    if len(set(gave)) > 1:
        found, gave = _normal(found), [_normal(answer) for answer in gave]
    return score(gave.count(found), len(gave))


def _bare(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _annotation(entry: object, where: str) -> tuple[int, list[str], list[str]]:
    """question_id, the annotators' answers, and the names that its score is added under."""
    found = entry if isinstance(entry, dict) else {}
    number, given = found.get("question_id"), found.get("answers")
    answers = given if isinstance(given, list) else []
    texts = [a["answer"] for a in answers if isinstance(a, dict) and type(a.get("answer")) is str]
    if type(number) is not int or not texts or len(texts) < len(answers):
        raise DataError(f"{where} has no question_id and answers: is it VQA's file of annotations?")
    answer_type = type_name(found.get("answer_type"), "answer_type", where)
    question_type = type_name(found.get("question_type"), "question_type", where)
    names = [answer_type, question_type and f"question_type/{question_type}"]
    return number, texts, [name for name in names if name]
