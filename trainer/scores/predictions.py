"""What the scores have in common: predictions by question, whether all are there, means by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, TypeVar

from shards.errors import DataError

Missing = Literal["error", "zero", "skip"]
"""What a question without a prediction is: an error, answered wrong, or left out."""

Id = TypeVar("Id", int, str)
Value = TypeVar("Value")
Pairs = Mapping[Id, Value] | Iterable[tuple[Id, Value]]
"""What belongs to questions: a mapping by their ids, or pairs of id and value."""


def by_question(pairs: Pairs[Id, Value], what: str = "prediction") -> Mapping[Id, Value]:
    """Pairs as a mapping. DataError where a question has two."""
    if isinstance(pairs, Mapping):
        return pairs
    out: dict[Id, Value] = {}
    for question, value in pairs:
        if question in out:
            raise DataError(f"question {question!r} has a second {what}: leave it one")
        out[question] = value
    return out


def check_predicted(
    given: Collection[Id], known: Collection[Id], due: Collection[Id], missing: Missing
) -> None:
    """DataError where predictions are of other questions than the `known` ones, where there is no
    question at all, and, unless `missing` is "zero", where one that is `due` has none."""
    if not known:
        raise DataError("there is no question in the files of annotations: name the task's own")
    if unknown := [question for question in given if question not in known]:
        raise DataError(
            f"{len(unknown):,} predictions are of questions that are in none of the files of "
            f"annotations (first: {unknown[0]!r:.60}): name those of the same split"
        )
    if missing == "error" and (without := [q for q in due if q not in given]):
        raise DataError(
            f"{len(without):,} of {len(due):,} questions have no prediction (first: "
            f"{without[0]!r:.60}): predict all, or let these count as wrong "
            "(`lxscale score --missing zero`)"
        )


def answer_text(prediction: object, question: object) -> str:
    """A predicted answer; DataError for what is no text."""
    if not isinstance(prediction, str):
        raise DataError(
            f"the prediction of question {question!r:.60} is {prediction!r:.40}, no text"
        )
    return prediction


def type_name(value: object, what: str, where: str) -> str | None:
    """A type of questions as an annotation names it, if it does; DataError for what is no name."""
    if value is None or (isinstance(value, str) and value.isprintable()):
        return value
    raise DataError(f"{where}: the {what} is {value!r:.40}, no name")


class Means:
    """Means of values, by the names that they are added under."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, value: float, *names: str) -> None:
        for name in names:
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1

    def by_name(self) -> dict[str, float]:
        """The means, in the order of their names."""
        return {name: total / count for name, (total, count) in sorted(self._sums.items())}
