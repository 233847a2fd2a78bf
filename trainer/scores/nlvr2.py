"""NLVR2's scores, as https://lil.nlp.cornell.edu/nlvr/ defines them.

A statement is about a pair of pictures, and made for several such pairs. Its identifier is
`split-set-pair-sentence`: those that differ in the pair alone have one sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.errors import DataError
from shards.sources.sentences.rows import json_lines
from trainer.scores.predictions import Missing, Pairs, by_question, check_predicted

_TRUTH = {"true": True, "false": False}


def score_nlvr2(
    predictions: Pairs[str, bool | str],
    labels: Pairs[str, bool | str],
    *,
    missing: Missing = "error",
) -> dict[str, float]:
    """`accuracy`; `consistency`, the share of the sentences that are judged right with every pair
    of pictures; `majority`, the accuracy of always saying what most labels are. Fractions.

    predictions, labels (`read_labels`): by identifier, True or False, as bool or as these words in
    any case.
    DataError for a statement without a prediction (unless `missing` is "zero": then it is judged
    wrong), with two or unknown, and for what is no identifier, label or prediction.
    """
    given, known = by_question(predictions), by_question(labels, "label")
    check_predicted(given, known, known, missing)
    if missing == "skip":
        known = {identifier: label for identifier, label in known.items() if identifier in given}
    correct, true, sentences = 0, 0, dict[str, bool]()
    for identifier, value in known.items():
        label = truth(value, f"the label of {identifier!r:.60}")
        found = given.get(identifier)
        right = found is not None and label == truth(found, f"the prediction of {identifier!r:.60}")
        sentence = sentence_of(identifier)
        sentences[sentence] = right and sentences.get(sentence, True)
        correct, true = correct + right, true + label
    return {
        "accuracy": correct / max(len(known), 1),
        "consistency": sum(sentences.values()) / max(len(sentences), 1),
        "majority": max(true, len(known) - true) / max(len(known), 1),
    }


def read_labels(files: Iterable[Path]) -> Iterator[tuple[str, bool]]:
    """Identifiers and labels of NLVR2's files, a statement in JSON a line. DataError naming file
    and line."""
    for path in files:
        for number, entry in json_lines(path, "file of statements"):
            where = f"{path}, line {number}"
            identifier, label = entry.get("identifier"), entry.get("label")
            if label is None:
                raise DataError(f"{where}: the statement has no label: name a split that has them")
            yield checked(identifier, where), truth(label, f"{where}: the label")


def truth(value: object, what: str) -> bool:
    """True or False, as bool or as these words in any case; DataError saying `what` is neither."""
    found = _TRUTH.get(str(value).lower())
    if found is None:
        raise DataError(f"{what} is {value!r:.40}, not True or False")
    return found


def checked(identifier: object, where: str) -> str:
    """An identifier `split-set-pair-sentence`; DataError for another value."""
    parts = identifier.split("-") if isinstance(identifier, str) else []
    if len(parts) != 4 or not all(part.isalnum() for part in parts):
        raise DataError(f"{where}: {identifier!r:.60} is no identifier (split-set-pair-sentence)")
    return str(identifier)


def sentence_of(identifier: str) -> str:
    """The identifier without its pair. DataError where it is none."""
    split, set_, _, sentence = checked(identifier, "a label").split("-")
    return f"{split}-{set_}-{sentence}"
