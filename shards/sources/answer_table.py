"""A joint answer table of several sets: which answers, and how much of the questions they cover.

An answer counts once for each question that has it with a score above 0, in the normal form of
LXMERT's table (`shards.format.answers`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import DataError, explained
from shards.format.answers import answer_index, load_answers, normalise_answer, normalise_answers
from shards.format.record import Sentence
from shards.json_files import read_list
from shards.sources.sentences.aggregated import SOURCE_NAMES
from shards.store.atomic import written_whole

# LXMERT's own code picks answers by its own names of the sets.
_LXMERT_NAMES = {ours: theirs for theirs, ours in SOURCE_NAMES.items()}


@dataclass
class Tally:
    """The answers of the questions that have been seen."""

    counts: Counter[str] = field(default_factory=Counter)
    """Questions that have an answer."""
    sets: dict[str, set[str]] = field(default_factory=dict)
    """Answer -> the sets in which it is."""

    def add(self, sentences: Iterable[Sentence]) -> None:
        for sentence in sentences:
            for answer, score in normalise_answers(sentence.answers or {}).items():
                if score <= 0:
                    continue
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
    ones by name. base: a table whose answers keep their ids and come first; DataError where it is
    larger than `size`, or there is no answer at all."""
    table = load_answers(base) if base else []
    if size is not None and len(table) > size:
        raise DataError(
            f"{base} has {len(table):,} answers, more than a table of {size:,} can have"
        )
    known = answer_index(table)
    fresh = sorted((-n, a) for a, n in tally.counts.items() if n >= min_count and a not in known)
    room = len(fresh) if size is None else size - len(table)
    table += [answer for _, answer in fresh[:room]]
    if not table:
        raise DataError(
            "the table would have no answer: name files of questions with answers, or ask for a "
            "lower --min-count"
        )
    return table


def cover(table: list[str], sentences: Iterable[Sentence], into: dict[str, Coverage]) -> None:
    """Count what a table covers, by set."""
    known = answer_index(table)
    for sentence in sentences:
        answers = normalise_answers(sentence.answers or {})
        if not any(answers.values()):
            continue
        of = into.setdefault(sentence.source, Coverage())
        found = {a: s for a, s in answers.items() if a in known and s > 0}
        of.questions += 1
        of.covered += bool(found)
        of.score += sum(answers.values())
        of.covered_score += sum(found.values())


def write_table(
    path: Path, table: Sequence[str], tally: Tally, lxmert: bool, base: Path | None = None
) -> None:
    """Write a table as a list of answers, or as LXMERT's `[{"ans", "dsets"}, …]` with LXMERT's
    names of the sets, those that `base` has among them; whole or not."""
    entries: list[object] = list(table)
    if lxmert:
        sets = _sets(base) if base else {}
        for answer in table:
            found = tally.sets.get(normalise_answer(answer), set())
            sets.setdefault(answer, set()).update(_LXMERT_NAMES.get(s, s) for s in found)
        entries = [{"ans": a, "dsets": sorted(sets[a])} for a in table]
    text = json.dumps(entries, indent=0 if not lxmert else None, ensure_ascii=False)
    try:
        content = f"{text}\n".encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the answer {text[max(error.start - 20, 0) : error.end]!r} has half of a character in "
            "it (a lone surrogate): mend it in the file of sentences"
        ) from None
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file for the table")
    with explained(path), written_whole(path) as temporary:
        temporary.write_bytes(content)


def _sets(base: Path) -> dict[str, set[str]]:
    """Answer → the sets that a table says it is in; none where it is a plain list."""
    out: dict[str, set[str]] = {}
    for entry in read_list(base, "answer table"):
        if isinstance(entry, dict):
            names = entry.get("dsets", [])
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise DataError(
                    f'the answer table {base}: the "dsets" of {entry.get("ans")!r:.60} are no list '
                    "of names"
                )
            out[entry["ans"]] = set(names)
    return out
