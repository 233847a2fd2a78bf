"""Rows of image and sentence: CSV with a header (commas or tabs), or a line of JSON each.

image      its name, as the features have it
sentence   a text
answers    optional: {"answer": score}, as JSON; a list; or answers with `;` between them (score 1)
source     optional: the name of the sentence's set
id         optional: of the question
kind       optional: of the question or its answer, as `yes/no`
split      optional: of the image
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.format.record import Report, Sentence, check_answers
from shards.sources.image_ids import image_id
from shards.sources.json_stream import head
from shards.sources.texts import ImageText, SentenceFormat

_COLUMNS = {"image", "sentence", "answers", "source", "id", "kind", "split"}
_LONGEST = 1 << 24  # bytes of a line


def json_lines(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and the objects in them; empty lines do not count. DataError naming file
    and line for anything else."""
    try:
        with open(path, "rb") as f:
            number = 0
            while line := f.readline(_LONGEST):
                number += 1
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"the {what} {path}, line {number} is not JSON: {error}; copy or make the "
                        "file again"
                    ) from None
                if not isinstance(entry, dict):
                    raise DataError(f"the {what} {path}, line {number} is not an object")
                yield number, entry
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error.strerror}") from None


def _detect(path: Path) -> bool:
    lines = _text(head(path)).splitlines()
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        try:
            entry = json.loads(first)
        except (ValueError, RecursionError):
            return False
        return isinstance(entry, dict) and {"image", "sentence"} <= set(entry)
    try:
        return {"image", "sentence"} <= set(_cells(first))
    except csv.Error:
        return False


def _text(begin: bytes) -> str:
    return begin.decode("utf-8-sig", "replace")


def _delimiter(header: str) -> str:
    return "\t" if "\t" in header else ","


def _cells(header: str) -> list[str]:
    return next(csv.reader([header], delimiter=_delimiter(header)), [])


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    begin = _text(_head(path)).lstrip()
    if begin.startswith("{"):
        yield from json_lines(path, "file of sentences")
        return
    header = begin.splitlines()[0] if begin else ""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.reader(f, delimiter=_delimiter(header), strict=True)
            names = _header(next((cells for cells in reader if cells), []), path)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{path}, line {reader.line_num}: not as many cells as the header has names"
                    )
                row = dict(zip(names, cells, strict=True))
                yield reader.line_num, {k: v for k, v in row.items() if v != ""}
    except csv.Error as error:
        raise DataError(f"{path} is no CSV: {error}; quote cells with line ends in them") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}; convert it") from None
    except OSError as error:
        raise DataError(f"cannot read the file of sentences {path}: {error.strerror}") from None


def _header(names: list[str], path: Path) -> list[str]:
    if missing := {"image", "sentence"} - set(names):
        raise DataError(f"{path}: the header has no column {sorted(missing)[0]!r}")
    if unknown := set(names) - _COLUMNS:
        raise DataError(f"{path}: the header has an unknown column {sorted(unknown)[0]!r:.40}")
    if len(names) != len(set(names)):
        raise DataError(f"{path}: the header has a column twice")
    return names


def _head(path: Path) -> bytes:
    try:
        return head(path)
    except OSError as error:
        raise DataError(f"cannot read the file of sentences {path}: {error.strerror}") from None


def _read(files: Sequence[Path], source: str, report: Report) -> Iterator[ImageText]:
    for path in files:
        for number, row in _rows(path):
            where = f"{path}, line {number}"
            if unknown := set(row) - _COLUMNS:
                raise DataError(f"{where}: unknown column {sorted(map(str, unknown))[0]!r:.40}")
            image, text = row.get("image"), row.get("sentence", "")
            if not isinstance(image, str) or not image.strip() or not isinstance(text, str):
                raise DataError(f"{where}: it has no image and sentence, both texts")
            if not text.strip():
                report.add("empty sentences", where)
                continue
            sentence = Sentence(
                text.strip(),
                _name(row, "source", where) or source,
                _answers(row.get("answers"), where),
                row.get("id"),
                _name(row, "kind", where),
            )
            if isinstance(sentence.id, bool) or not isinstance(sentence.id, str | int | None):
                raise DataError(f"{where}: the id {sentence.id!r:.40} is no text or whole number")
            yield ImageText(image_id(image), (sentence,), _name(row, "split", where))


def _name(row: Mapping[str, Any], column: str, where: str) -> str | None:
    value = row.get(column)
    if value is not None and (not isinstance(value, str) or not value):
        raise DataError(f"{where}: the {column} {value!r:.40} is no name")
    return value


def _answers(given: object, where: str) -> dict[str, float] | None:
    if given is None:
        return None
    if isinstance(given, str):
        text = given.strip()
        if text.startswith(("{", "[")):
            try:
                given = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: the answers are no JSON: {error}") from None
        else:
            given = [part.strip() for part in text.split(";") if part.strip()]
    if isinstance(given, list):
        if not all(isinstance(a, str) for a in given):
            raise DataError(f"{where}: the answers are not all texts")
        given = dict.fromkeys((a for a in given if a.strip()), 1.0)
    return check_answers(given, where)


FORMAT = SentenceFormat(
    name="rows",
    help="CSV or JSON lines of image, sentence, answers, source, id, kind, split",
    source="sentences",
    detect=_detect,
    read=_read,
)
