"""Bottom-up-attention TSVs.

No header, one row an image, and base64 of raw little-endian memory in the array columns. Both
layouts are read, told apart by the number of columns:

    10: img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features
     6: image_id image_w image_h num_boxes boxes features          (plain release, no labels)

ids are int64, all else float32; boxes (n, 4) in pixels, features (n, 2048). Rows are split by hand:
csv has a limit on fields and quoting rules that this format does not.
"""

from __future__ import annotations

import binascii
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
import pybase64
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.record import Labels
from shards.sources import checks
from shards.sources.checks import PartError
from shards.sources.regions import Entry, FeatureFormat, Options, Reader, Regions, one_file
from shards.store import objects

_LABELS = ("objects_id", "objects_conf", "attrs_id", "attrs_conf")
COLUMNS = {
    10: ("img_id", "img_h", "img_w", *_LABELS, "num_boxes", "boxes", "features"),
    6: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
}
_LONGEST_ROW = 64 << 20  # bytes; 1,000 boxes have 11 MB: a longer row has lost its line end
_HEAD = 32 << 10  # bytes: of a row of 300 boxes, all but the features
_READ = 256 << 10  # bytes at a time, of a row of which no more is known
_AGAIN = "extract or copy the file again, or leave such rows out with --skip-bad"


def _detect(place: str) -> bool:
    path = objects.local_path(place)
    if path is None or not path.is_file():
        return False
    with open(path, "rb") as f:
        head = f.read(1 << 16)
    cells = head.split(b"\n")[0].split(b"\t")
    if len(cells) == 10:  # VinVL's and others' rows have two or three
        return all(c.strip().isdigit() for c in cells[1:3]) and _is_base64(cells[3])
    whole = len(cells) == 6 or (b"\n" not in head and len(cells) >= 5)
    return whole and all(c.isdigit() for c in cells[1:4]) and _is_base64(cells[4])


def _is_base64(cell: bytes) -> bool:
    return bool(cell) and not cell[:64].strip(b"=").translate(None, _BASE64)


_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


@contextlib.contextmanager
def _opened(path: str, buffering: int = 1 << 20) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb", buffering=buffering) as f:
            yield f
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _entries(path: str, options: Options) -> Iterator[Entry]:
    columns = 0
    with _opened(path, 0) as f:
        lines = _lines(f.fileno(), path, options.feature_dim)
        for number, (at, head, tabs, whole) in enumerate(lines, 1):
            where = f"line {number}"
            if not columns and tabs + 1 not in COLUMNS:
                problem = (
                    f"{tabs + 1} columns, where a bottom-up-attention TSV has 10 (with labels) or 6"
                )
                yield Entry("", str(at), where, problem=problem)
                continue
            columns = columns or tabs + 1
            names = COLUMNS[columns]
            try:
                _check_columns(tabs + 1, columns, whole)
                row = dict(zip(names, head.split(b"\t"), strict=False))
                yield Entry(_text(row, names[0]), str(at), where, _integer(row, "num_boxes"))
            except PartError as error:
                yield Entry("", str(at), f"{where}, {error.part}", problem=str(error))


_Line = tuple[int, bytes, int, bool]
"""Where a line begins, what is before its last two columns (the long ones, boxes and features), how
many tabs it has, and whether it has its end."""


def _lines(file: int, path: str, width: int) -> Iterator[_Line]:
    """The lines of an open file. Of a row whose features have the given width, its beginning alone
    is read; what is in the features is looked at when they are. DataError at one that does not
    end."""
    at = number = 0
    while begin := os.pread(file, _HEAD, at):
        number += 1
        short = begin.find(b"\n")
        if short >= 0:
            tabs = _tabs(begin[:short])
            line, end = (at, _head(begin, tabs), len(tabs), True), at + short + 1
        else:
            found = _by_count(file, at, begin, width)
            line, end = found or _by_scan(file, at, f"{path}, line {number}")
        yield line
        at = end


def _by_count(file: int, at: int, begin: bytes, width: int) -> tuple[_Line, int] | None:
    """The line at `at`, which begins with `begin`, and where the next one begins; None where the
    line does not end where its number of boxes says."""
    tabs = _tabs(begin)
    if len(tabs) + 1 not in COLUMNS:
        return None
    head = _head(begin, tabs)
    boxes = head.rpartition(b"\t")[2]
    if not boxes.isdigit() or len(boxes) > 9:
        return None
    end = at + tabs[-1] + 1 + _encoded(int(boxes) * width * 4)
    after = os.pread(file, 2, end)
    feed = 1 if after[:1] == b"\n" else 2 if after == b"\r\n" else 0
    return ((at, head, len(tabs), True), end + feed) if feed else None


def _head(begin: bytes, tabs: list[int]) -> bytes:
    return begin[: tabs[-2]] if len(tabs) > 1 else b""


def _encoded(size: int) -> int:
    """Characters of so many bytes in base64."""
    return -(-size // 3) * 4


def _by_scan(file: int, at: int, where: str) -> tuple[_Line, int]:
    """The same of any line, which is read to its end."""
    tabs: list[int] = []
    size, stop = 0, -1
    while stop < 0 and (data := os.pread(file, _READ, at + size)):
        stop = data.find(b"\n")
        tabs += [size + t for t in _tabs(data[:stop] if stop >= 0 else data)]
        size += len(data) if stop < 0 else stop
        if stop < 0 and size >= _LONGEST_ROW:
            raise DataError(f"{where}: the row does not end: not such a TSV")
    tabs = tabs[: max(COLUMNS) + 1]
    head = os.pread(file, tabs[-2], at) if len(tabs) > 1 else b""
    return (at, head, len(tabs), stop >= 0), at + size + (stop >= 0)


def _tabs(data: bytes) -> list[int]:
    """Where they are; of more than belong in a line one more."""
    found: list[int] = []
    at = -1
    while len(found) <= max(COLUMNS) and (at := data.find(b"\t", at + 1)) >= 0:
        found.append(at)
    return found


@contextlib.contextmanager
def _reader(path: str, options: Options) -> Iterator[Reader]:
    with _opened(path) as f:

        def read(entry: Entry) -> Regions:
            f.seek(int(entry.position))
            line = f.readline(_LONGEST_ROW)
            cells = line.rstrip(b"\r\n").split(b"\t")
            columns = len(cells) if len(cells) in COLUMNS else 10
            row = _row(cells, columns, line)
            try:
                return _decode(row, columns == 10, options)
            except PartError as error:
                # The last column is the long one: a file cut off mostly ends in it.
                if not line.endswith(b"\n") and error.part == f"column {COLUMNS[columns][-1]}":
                    raise _truncated(COLUMNS[columns][-1]) from None
                raise PartError(error.part, f"{error}; {_AGAIN}") from None

        yield read


def _row(cells: list[bytes], columns: int, line: bytes) -> dict[str, bytes]:
    """The cells of a line by column."""
    _check_columns(len(cells), columns, line.endswith(b"\n"))
    return dict(zip(COLUMNS[columns], cells, strict=True))


def _check_columns(found: int, columns: int, whole: bool) -> None:
    names = COLUMNS[columns]
    if found < columns:
        if not whole:
            raise _truncated(names[found - 1])
        raise _bad(names[found], "it is missing: extract or copy the file again")
    if found > columns:
        raise _bad(
            names[-1], f"{found} columns instead of {columns}: extract or copy the file again"
        )


def _bad(column: str, problem: str) -> PartError:
    return PartError(f"column {column}", problem)


def _checked(column: str, check: Callable[..., NDArray], *arguments: Any) -> NDArray:
    return checks.checked(f"column {column}", check, *arguments)


def _truncated(column: str) -> PartError:
    return _bad(
        column,
        "the last row is truncated: copy the file again, or leave the row out with --skip-bad",
    )


def _decode(row: dict[str, bytes], with_labels: bool, options: Options) -> Regions:
    prefix = "img" if with_labels else "image"
    height, width = _integer(row, f"{prefix}_h"), _integer(row, f"{prefix}_w")
    n = _integer(row, "num_boxes")
    features = _array(row, "features", "<f4", n, options.feature_dim)
    pixels = _array(row, "boxes", "<f4", n, 4)
    return Regions(
        image=_text(row, f"{prefix}_id"),
        width=width,
        height=height,
        boxes=_checked("boxes", checks.fractions, pixels, width, height),
        features=features,
        labels=_labels(row, n, options) if with_labels else None,
    )


def _labels(row: dict[str, bytes], n: int, options: Options) -> Labels:
    def ids(column: str, classes: int) -> NDArray[np.int32]:
        values = _array(row, column, "<i8", n, 1).reshape(n)
        return _checked(column, checks.ids, values, classes)

    def confidences(column: str) -> NDArray[np.float32]:
        values = _array(row, column, "<f4", n, 1).reshape(n)
        return _checked(column, checks.confidences, values)

    return Labels(
        ids("objects_id", options.object_classes),
        confidences("objects_conf"),
        ids("attrs_id", options.attribute_classes),
        confidences("attrs_conf"),
    )


def _text(row: dict[str, bytes], column: str) -> str:
    try:
        text = row[column].decode("utf-8")
    except UnicodeDecodeError:
        raise _bad(column, f"it is not UTF-8 text; {_AGAIN}") from None
    if not text:
        raise _bad(column, f"it is empty; {_AGAIN}")
    return text


def _integer(row: dict[str, bytes], column: str) -> int:
    cell = row[column]
    if not cell.isdigit() or len(cell) > 9 or int(cell) == 0:
        raise _bad(column, f"{cell[:40].decode('ascii', 'replace')!r} is no positive integer")
    return int(cell)


def _array(row: dict[str, bytes], column: str, dtype: str, n: int, width: int) -> NDArray:
    """The (n, width) array of a base64 cell."""
    try:
        data = pybase64.b64decode(row[column], validate=True)
    except binascii.Error as error:
        raise _bad(column, f"damaged base64 ({error})") from None
    due = n * width * np.dtype(dtype).itemsize
    if len(data) != due:
        raise _bad(
            column, f"{len(data)} bytes, where {n} boxes × {width} values of {dtype[1:]} are {due}"
        )
    return np.frombuffer(data, dtype).reshape(n, width)


FORMAT = FeatureFormat(
    name="tsv",
    help="bottom-up-attention TSV, with labels (10 columns) or without (6)",
    extractor="bottom-up-attention",
    detect=_detect,
    files=one_file,
    entries=_entries,
    reader=_reader,
)
