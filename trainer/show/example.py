"""A pair's row in the list of a page: what it asks, what is right, what the model says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.format.answers import normalise_answer
from shards.format.record import Sentence

_NUMBER = re.compile(r"[-+]?\d[\d.,]*")


@dataclass(frozen=True)
class Example:
    """What the list shows of a pair, and what it is filtered and counted by."""

    image: int
    """Number of its image in the page."""
    image_id: str
    sentence: int
    """Place among the image's sentences there."""
    number: int
    """Of its sentence in the record."""
    id: str | int | None
    text: str
    source: str
    kind: str
    type: str | None
    """Of its best answer: yes/no, number or other; None without an answer."""
    objects: int
    truth: tuple[tuple[str, float, bool], ...]
    """True answers with their scores, best first, and whether the answer table has them."""
    answer: str | None
    """The model's; None where it answers nothing, or the sentence is no question."""
    score: float | None
    """Of that answer among the true ones; None also where none of these is in the table."""
    matching: float | None


def kind_of(sentence: Sentence, question: bool) -> str:
    """The kind of a question: as the data set has it, or its first two words; of another sentence,
    its source."""
    if sentence.kind:
        return sentence.kind
    if not question:
        return sentence.source
    return " ".join(re.findall(r"[\w']+", sentence.text.lower())[:2]) or "(no words)"


def answer_type(answers: Mapping[str, float] | None) -> str | None:
    """VQA's types: yes/no, number, other; of the best answer."""
    if not answers:
        return None
    best = normalise_answer(max(answers, key=lambda answer: answers[answer]))
    if best in ("yes", "no"):
        return "yes/no"
    return "number" if _NUMBER.fullmatch(best) else "other"


def truth_of(sentence: Sentence, table: Mapping[str, int]) -> tuple[tuple[str, float, bool], ...]:
    """The true answers of a sentence; table: normal form → answer id."""
    ranked = sorted((sentence.answers or {}).items(), key=lambda entry: -entry[1])
    return tuple((answer, score, normalise_answer(answer) in table) for answer, score in ranked)


def score_of(
    answer: int, ids: Sequence[int] | NDArray[np.int32], scores: NDArray[np.float32]
) -> float | None:
    """The score of an answer of the table among a pair's, as the evaluation counts it."""
    if not len(ids):
        return None
    return round(float(scores[np.asarray(ids) == answer].sum()), 4)
