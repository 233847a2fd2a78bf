"""Answers: their normal form and the joint answer table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shards.errors import DataError
from shards.json_files import read_list

# The normal form of LXMERT's joint answer table (LXMERT paper, section 3.1, and released code).
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WHOLE = {"grey": "gray"} | {word: str(i) for i, word in enumerate(_NUMBERS, 1)}


def normalise_answer(answer: str) -> str:
    """Lower case, no final '.', no leading article, number words one…ten as digits, grey → gray."""
    text = answer.strip().lower().removesuffix(".").strip()
    for article in ("a ", "an ", "the "):
        text = text.removeprefix(article).strip()
    return _WHOLE.get(text, text)


def normalise_answers(answers: Mapping[str, float]) -> dict[str, float]:
    """{normal form: score}; answers that become equal keep the higher score."""
    out: dict[str, float] = {}
    for answer, score in answers.items():
        normal = normalise_answer(answer)
        if normal:
            out[normal] = max(score, out.get(normal, 0.0))
    return out


def answer_index(table: Sequence[str]) -> dict[str, int]:
    """Normal form → answer id. Where entries of the table share one, an entry that is itself in
    normal form goes first."""
    index: dict[str, int] = {}
    for i, answer in enumerate(table):
        if normalise_answer(answer) == answer:
            index.setdefault(answer, i)
    for i, answer in enumerate(table):
        index.setdefault(normalise_answer(answer), i)
    index.pop("", None)
    return index


def count_answers(all_answers: Iterable[Mapping[str, float]], min_count: int = 1) -> list[str]:
    """An answer table out of the data: `answer_table` of how many sentences have each answer."""
    counts: Counter[str] = Counter()
    for answers in all_answers:
        counts.update(normalise_answers(answers).keys())
    return answer_table(counts, min_count)


def answer_table(counts: Mapping[str, int], min_count: int = 1) -> list[str]:
    """The answers that enough sentences have: by falling number, then by name."""
    kept = [(-n, answer) for answer, n in counts.items() if n >= min_count]
    return [answer for _, answer in sorted(kept)]


def load_answers(path: str | Path) -> list[str]:
    """An answer table: a JSON list of strings, or LXMERT's all_ans.json `[{"ans": …}, …]`.

    Raises DataError naming the file and entry for anything else and for repeated answers.
    """
    entries = read_list(path, "answer table")
    table = [entry.get("ans") if isinstance(entry, dict) else entry for entry in entries]
    seen: dict[str, int] = {}
    for i, answer in enumerate(table):
        if not isinstance(answer, str):
            raise DataError(f"the answer table {path}: entry {i} is not an answer")
        if answer in seen:
            raise DataError(
                f"the answer table {path}: {answer!r:.60} is entry {seen[answer]} and {i}"
            )
        seen[answer] = i
    return list(seen)
