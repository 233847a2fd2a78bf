"""A pair's row in the list of a page: what it asks, what is right, what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.format.answers import normalise_answer
from shards.format.record import Sentence

Truth = tuple[tuple[str, float, str | None], ...]
"""True answers with their scores, best first, and as the answer table has them; None where it lacks
them."""


@dataclass(frozen=True)
class Example:
    """What the list shows of a pair, and what it is filtered and counted by."""

    image: int
    """Number of its image record in the page."""
    image_id: str
    sentence: int
    """Place among the record's sentences there."""
    number: int
    """Of its sentence in the record."""
    id: str | int | None
    text: str
    source: str
    kind: str
    type: str | None
    """Of its best answer: yes/no, number or other; None without an answer."""
    objects: int
    truth: Truth
    answer: str | None
    """The model's; None where it answers nothing, or the sentence is no question."""
    score: float | None
    """Of that answer among the true ones; None also where none of these is in the table."""
    matching: float | None


def truth_of(sentence: Sentence, table: Mapping[str, int], answers: Sequence[str]) -> Truth:
    """The true answers of a sentence. table: normal form → answer id."""
    ranked = sorted((sentence.answers or {}).items(), key=lambda entry: -entry[1])
    ids = [table.get(normalise_answer(answer)) for answer, _ in ranked]
    known = [None if i is None else answers[i] for i in ids]
    return tuple((*entry, name) for entry, name in zip(ranked, known, strict=True))


def score_of(
    answer: int, ids: Sequence[int] | NDArray[np.int32], scores: NDArray[np.float32]
) -> float | None:
    """The score of an answer of the table among a pair's, as the evaluation counts it."""
    if not len(ids):
        return None
    return round(float(scores[np.asarray(ids) == answer].sum()), 4)
