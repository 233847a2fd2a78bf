"""GQA's scores, as https://cs.stanford.edu/people/dorarad/gqa/evaluate.html defines them.

All are over the balanced questions (`isBalanced`; where a file does not say, all are), by the exact
text of the answer:

accuracy       of all, of `binary` and `open` questions (open: of the structural type `query`),
               and by structural and semantic type
consistency    of each question that is answered right and entails others, the share of those that
               are, too; averaged
validity       whether the answer is of the kind that was asked for (a colour), and
plausibility   whether it occurs with such an object anywhere, by the file of choices
distribution   how far the frequencies of answers are from the true ones, over groups of questions:
               χ² of each group, averaged by its size, over 100. Not a fraction; less is better

Each is there where its files and keys are. Not here: grounding, which needs a model's attention,
and accuracies by number of words and of steps.

Unbalanced questions serve consistency alone: predict all of them, or none; with none, consistency
is left out if balanced questions entail any of them. It is left out, too, where an entailed
question is in none of the files, as with the file of balanced questions alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from shards.errors import DataError
from shards.sources.json_stream import pairs
from trainer.scores.predictions import (
    Means,
    Missing,
    Pairs,
    answer_text,
    by_question,
    check_predicted,
    type_name,
)

NEEDS = {
    "consistency": "every entailed question in the files of annotations, and a prediction of each",
    "validity": "the file of choices",
    "plausibility": "the file of choices",
    "distribution": "groups of questions in the files of annotations",
}
"""What scores that may be left out need."""

# Questions about what two objects have in common have these as choices, whatever the file says.
_COMMON: tuple[str, ...] = ("color", "material", "shape")


@dataclass(frozen=True)
class _Question:
    answer: str
    balanced: bool
    entailed: tuple[str, ...]  # ids of other questions
    names: tuple[str, ...]  # that its score is added under
    group: str | None
    common: bool


def score_gqa(
    predictions: Pairs[str, str],
    questions: Iterable[Path],
    choices: Iterable[Path] = (),
    *,
    missing: Missing = "error",
) -> dict[str, float]:
    """`accuracy`, `accuracy/binary`, `accuracy/open`, `accuracy/structural/query`, …,
    `accuracy/semantic/rel`, …, `consistency`, `validity`, `plausibility`, `distribution`.

    predictions: answers by question id, which is a text with its leading zeros. questions, choices:
    GQA's files, chunks of large ones each.
    DataError for a question without a prediction (unless `missing` is "zero": then it is answered
    wrong, and adds to no distribution), with two or unknown, for one without choices where such
    files are given, and for files that are not as published.
    """
    given = by_question(predictions)
    right: dict[str, bool] = {}
    balanced: dict[str, tuple[str, ...]] = {}  # with what each entails
    common = set[str]()
    means = Means()
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for path in questions:
        for number, entry in pairs(path, "file of questions"):
            if number in right:
                raise DataError(f"{path}: question {number:.40} comes twice: name each file once")
            if missing == "skip" and number not in given:
                continue
            question = _question(number, entry, path)
            answer = answer_text(given[number], number) if number in given else None
            right[number] = answer == question.answer
            if not question.balanced:
                continue
            balanced[number] = question.entailed
            means.add(float(right[number]), "accuracy", *question.names)
            if question.common:
                common.add(number)
            if question.group is not None:
                gold[question.group][question.answer] += 1
                if answer is not None:
                    predicted[question.group][answer] += 1

    # The others are asked for as soon as one of them is predicted.
    asked = right if any(q in given for q in right if q not in balanced) else balanced
    check_predicted(given, right, asked, missing)
    if not balanced:
        raise DataError(
            "no question is balanced, and the scores are of those: name their file, too"
        )
    out = means.by_name()
    consistency = _consistency(right, balanced, asked)
    if consistency is not None:
        out["consistency"] = consistency
    out |= _by_choices(given, balanced, common, choices)
    if gold:
        out["distribution"] = _distance(gold, predicted) / 100
    return out


def _consistency(
    right: Mapping[str, bool], balanced: Mapping[str, tuple[str, ...]], asked: Mapping[str, Any]
) -> float | None:
    """None where a question is entailed that was not asked, or none is entailed at all."""
    entailing = {number: entailed for number, entailed in balanced.items() if entailed}
    if not entailing or not all(e in asked for each in entailing.values() for e in each):
        return None
    shares = [
        sum(right[e] for e in entailed) / len(entailed)
        for number, entailed in entailing.items()
        if right[number]
    ]
    return sum(shares) / len(shares) if shares else 0.0


def _by_choices(
    given: Mapping[str, str],
    balanced: Mapping[str, tuple[str, ...]],
    common: set[str],
    choices: Iterable[Path],
) -> dict[str, float]:
    """Validity and plausibility; nothing without files of choices."""
    means, seen, any_file = Means(), set[str](), False
    for path in choices:
        any_file = True
        for number, entry in pairs(path, "file of choices"):
            if number not in balanced:
                continue
            if number in seen:
                raise DataError(f"{path}: question {number:.40} comes twice: name each file once")
            seen.add(number)
            for name, kind in (("validity", "valid"), ("plausibility", "plausible")):
                listed = entry.get(kind) if isinstance(entry, dict) else None
                if not _texts(listed):
                    raise DataError(
                        f"{path}: question {number:.40} has no list {kind!r}: is it GQA's file of "
                        "choices?"
                    )
                allowed = _COMMON if number in common else tuple(listed)
                # A prediction that is missing is in neither.
                means.add(float(given.get(number) in allowed), name)
    if any_file and (without := [number for number in balanced if number not in seen]):
        raise DataError(
            f"{len(without):,} questions are in no file of choices (first: {without[0]!r:.60}): "
            "name that of the same split"
        )
    return means.by_name()


def _distance(gold: Mapping[str, Counter[str]], predicted: Mapping[str, Counter[str]]) -> float:
    """χ² of predicted against true frequencies of each group's true answers, averaged over the
    groups by their numbers of questions."""
    weighted = 0.0
    for group, answers in gold.items():
        found = predicted.get(group, Counter())
        distance = sum((found[answer] - count) ** 2 / count for answer, count in answers.items())
        weighted += distance * answers.total()
    return weighted / sum(answers.total() for answers in gold.values())


def _question(number: str, entry: object, path: Path) -> _Question:
    where = f"{path}: question {number:.40}"
    found = entry if isinstance(entry, dict) else {}
    answer, balanced = found.get("answer"), found.get("isBalanced", True)
    if not isinstance(answer, str):
        raise DataError(
            f"{where} has no answer: name questions that come with answers (testdev, val)"
        )
    if not isinstance(balanced, bool):
        raise DataError(f"{where}: isBalanced is {balanced!r:.40}, not true or false")
    entailed = found.get("entailed") or []
    if not _texts(entailed):
        raise DataError(f"{where}: entailed is no list of question ids")
    types, groups = _object(found, "types", where), _object(found, "groups", where)
    structural = type_name(types.get("structural"), "structural type", where)
    semantic = type_name(types.get("semantic"), "semantic type", where)
    detailed = type_name(types.get("detailed"), "detailed type", where)
    names = []
    if structural:
        answers = "open" if structural == "query" else "binary"
        names += [f"accuracy/{answers}", f"accuracy/structural/{structural}"]
    if semantic:
        names.append(f"accuracy/semantic/{semantic}")
    return _Question(
        answer,
        balanced,
        tuple(other for other in entailed if other != number),
        tuple(names),
        type_name(groups.get("global"), "global group", where),
        "Common" in (detailed or ""),
    )


def _object(found: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = found.get(key)
    if value is not None and not isinstance(value, dict):
        raise DataError(f"{where}: {key} is {value!r:.40}, no object")
    return value or {}


def _texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
