"""What questions alone give away: how often the most frequent answer of each text is right."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError
from shards.sources.sentences.rows import json_lines

STATEMENT = "statement"


@dataclass(frozen=True)
class Prior:
    """Of the questions of a kind in a held-out file."""

    questions: int
    accuracy: float
    """Of each text's most frequent answer in the file that is learned from (of the kind's, where
    that file lacks the text), 0..1."""
    chance: float
    """Of a random one of each text's answers there."""


def language_prior(learned: Path, held_out: Path) -> dict[str, Prior]:
    """By kind, in the order of names. Both are files of questions, or both of statements (of kind
    `statement`), as scenes are written: a line of JSON each. Memory grows with different texts
    alone. DataError naming file and line for anything else."""
    texts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for kind, text, answer in _answered(learned):
        texts[text][answer] += 1
        kinds[kind][answer] += 1
    right: Counter[str] = Counter()
    number: Counter[str] = Counter()
    chance: defaultdict[str, float] = defaultdict(float)
    for kind, text, answer in _answered(held_out):
        known = texts[text] if text in texts else kinds[kind]
        best = max(known, key=lambda a: (known[a], a), default="")
        number[kind] += 1
        right[kind] += best == answer
        chance[kind] += 1 / max(len(known), 1)
    return {k: Prior(n, right[k] / n, chance[k] / n) for k, n in sorted(number.items())}


def _answered(path: Path) -> Iterator[tuple[str, str, str]]:
    """Kind, text and answer of each line."""
    for line, entry in json_lines(path, "file of questions"):
        try:
            if "label" in entry:
                yield STATEMENT, entry["sentence"], entry["label"]
            else:
                (answer,) = entry["answers"]
                yield entry["kind"], entry["sentence"], answer
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}, line {line}: it has no sentence with a kind and one answer, and no label"
            ) from None
