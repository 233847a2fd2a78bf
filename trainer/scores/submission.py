"""Files of predictions, as the tasks' evaluations take them.

vqa     `[{"question_id": 262148000, "answer": "down"}, …]`
gqa     `[{"questionId": "02930152", "prediction": "no"}, …]`
nlvr2   a line for each statement: `dev-850-0-0,True`

Writers take rows as they come, in the order of the ids (VQA's are numbers, the others' texts) and
each id once, so that equal predictions are equal bytes; a file is there when it is whole. Readers
go row by row, too. Both raise DataError for what such a file cannot hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

from shards.errors import DataError, explained
from shards.sources.json_stream import list_items
from shards.store.atomic import written_whole
from trainer.scores.nlvr2 import checked, truth
from trainer.scores.predictions import Value, answer_text

_LONGEST = 1 << 10  # characters of a line of NLVR2's, many more than it needs


def write_vqa(path: Path, rows: Iterable[tuple[int | str, str]]) -> None:
    """Write rows of question_id and answer. Ids are numbers; data sets of others may have texts,
    which come after."""
    ordered = _in_order(rows, _number, answer_text)
    write_list(path, ({"question_id": number, "answer": answer} for number, answer in ordered))


def write_gqa(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write rows of question id, a text with its leading zeros, and answer."""
    ordered = _in_order(rows, _text, answer_text)
    write_list(path, ({"questionId": number, "prediction": answer} for number, answer in ordered))


def write_nlvr2(path: Path, rows: Iterable[tuple[str, bool]]) -> None:
    """Write rows of identifier and judgement."""

    def judged(value: object, identifier: object) -> bool:
        return truth(value, f"the prediction of {identifier!r:.60}")

    checked_rows = _in_order(rows, lambda given: checked(given, "a row"), judged)
    _write(path, (f"{identifier},{value}\n" for identifier, value in checked_rows))


def read_vqa(path: Path) -> Iterator[tuple[int, str]]:
    """question_id and answer of each row."""
    for where, entry in _entries(path):
        number = entry.get("question_id")
        if type(number) is not int:
            raise DataError(f"{where}: the question_id is {number!r:.40}, no whole number")
        yield number, _answer(entry, "answer", where)


def read_gqa(path: Path) -> Iterator[tuple[str, str]]:
    """Question id and answer of each row."""
    for where, entry in _entries(path):
        number = entry.get("questionId")
        if not isinstance(number, str):
            raise DataError(
                f"{where}: the questionId is {number!r:.40}: write it as text, with its leading "
                "zeros"
            )
        yield number, _answer(entry, "prediction", where)


def read_nlvr2(path: Path) -> Iterator[tuple[str, bool]]:
    """Identifier and judgement of each line."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            number = 0
            while line := f.readline(_LONGEST):
                number += 1
                if not line.strip():
                    continue
                where = f"the predictions {path}, line {number}"
                identifier, comma, value = line.strip().partition(",")
                if not comma:
                    raise DataError(f"{where}: it is not identifier,True or identifier,False")
                yield checked(identifier, where), truth(value.strip(), f"{where}: the prediction")
    except UnicodeDecodeError as error:
        raise DataError(f"the predictions {path} are no UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise DataError(f"cannot read the predictions {path}: {error.strerror}") from None


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row is, for errors, and the row."""
    for i, entry in list_items(path, "file of predictions"):
        where = f"{path}: prediction {i}"
        if not isinstance(entry, dict):
            raise DataError(f"{where} is {entry!r:.40}, no object")
        yield where, entry


def _answer(entry: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(entry.get(key), str):
        raise DataError(f"{where}: the {key} is {entry.get(key)!r:.40}, no text")
    return str(entry[key])


def _in_order(
    rows: Iterable[tuple[Any, Value]],
    checked_id: Callable[[object], int | str],
    checked_value: Callable[[object, object], Value],
) -> Iterator[tuple[int | str, Value]]:
    last: int | str | None = None
    for given, value in rows:
        question = checked_id(given)
        if last is not None and _place(question) <= _place(last):
            raise DataError(
                f"the prediction of question {question!r:.60} comes after that of {last!r:.60}: "
                "sort them by their ids, each once"
            )
        last = question
        yield question, checked_value(value, question)


def _place(question: int | str) -> tuple[bool, int | str]:
    return isinstance(question, str), question


def _number(given: object) -> int | str:
    if isinstance(given, str):
        return given
    if not isinstance(given, Integral) or isinstance(given, bool):
        raise DataError(f"the question_id {given!r:.60} is no whole number")
    return int(given)


def _text(given: object) -> str:
    if not isinstance(given, str):
        raise DataError(f"the question id {given!r:.60} is no text: GQA's have leading zeros")
    return given


def write_list(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a list of objects in JSON, one a line."""
    _write(path, _json_list(rows))


def _json_list(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    before = "[\n"
    for row in rows:
        yield before + json.dumps(row)
        before = ",\n"
    yield "\n]\n" if before == ",\n" else "[]\n"


def _write(path: Path, parts: Iterable[str]) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file for the predictions")
    with explained(path), written_whole(path) as temporary, open(temporary, "w") as f:
        f.writelines(parts)
