"""What kind a question is of, and what type its answer."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shards.format.answers import normalise_answer

_NUMBER = re.compile(r"[-+]?\d[\d.,]*")


def kind_of(kind: str | None, question: str) -> str:
    """As the data set has it; else the question's first two words."""
    return kind or " ".join(re.findall(r"[\w']+", question.lower())[:2]) or "(no words)"


def answer_type(answers: Mapping[str, float] | None) -> str | None:
    """VQA's types: yes/no, number, other; of the best answer. None where there is none."""
    if not answers:
        return None
    best = normalise_answer(max(answers, key=lambda answer: answers[answer]))
    if best in ("yes", "no"):
        return "yes/no"
    return "number" if _NUMBER.fullmatch(best) else "other"
