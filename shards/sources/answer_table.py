"""A joint answer table of several sets: which answers, and how much of the questions they cover.

An answer counts once for each question that has it with a score above 0, in the normal form of
LXMERT's table (`shards.format.answers`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import explained
from shards.format.answers import answer_index, load_answers, normalise_answers
from shards.format.record import Sentence
from shards.store.atomic import written_whole


@dataclass
class Tally:
    """The answers of the questions that have been seen."""

    counts: Counter[str] = field(default_factory=Counter)
    """Questions that have an answer."""
    sets: dict[str, set[str]] = field(default_factory=dict)
    """Answer -> the sets in which it is."""

    def add(self, sentences: Iterable[Sentence]) -> None:
        for sentence in sentences:
            answers = normalise_answers(sentence.answers or {})
            for answer in answers:
                self.counts[answer] += 1
                self.sets.setdefault(answer, set()).add(sentence.source)


@dataclass
class Coverage:
    """How much of a set's questions a table has answers for."""

    questions: int = 0
    """With answers."""
    covered: int = 0
    """Of them, those with an answer in the table."""
    score: float = 0.0
    """Sum of all answers' scores."""
    covered_score: float = 0.0


def make_table(
    tally: Tally, *, min_count: int = 1, size: int | None = None, base: Path | None = None
) -> list[str]:
    """The answers that at least `min_count` questions have, the `size` most frequent of them; equal
    ones by name. base: a table whose answers keep their ids and come first."""
    table = load_answers(base) if base else []
    known = answer_index(table)
    fresh = sorted((-n, a) for a, n in tally.counts.items() if n >= min_count and a not in known)
    room = len(fresh) if size is None else max(size - len(table), 0)
    return table + [answer for _, answer in fresh[:room]]


def cover(table: list[str], sentences: Iterable[Sentence], into: dict[str, Coverage]) -> None:
    """Count what a table covers, by set."""
    known = answer_index(table)
    for sentence in sentences:
        answers = normalise_answers(sentence.answers or {})
        if not answers:
            continue
        of = into.setdefault(sentence.source, Coverage())
        found = {a: s for a, s in answers.items() if a in known}
        of.questions += 1
        of.covered += bool(found)
        of.score += sum(answers.values())
        of.covered_score += sum(found.values())


def write_table(path: Path, table: list[str], tally: Tally, lxmert: bool) -> None:
    """Write a table as a list of answers, or as LXMERT's `[{"ans", "dsets"}, …]`; whole or not."""
    entries: list[object] = list(table)
    if lxmert:
        entries = [{"ans": a, "dsets": sorted(tally.sets.get(a, ()))} for a in table]
    text = json.dumps(entries, indent=0 if not lxmert else None, ensure_ascii=False)
    with explained(path), written_whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
