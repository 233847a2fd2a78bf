"""Image records from bottom-up-attention TSVs and LXMERT's aggregated sentences.

The TSVs have no header, one row an image, and base64 of raw little-endian memory in the array
columns. Both layouts are read, told apart by the number of columns:

    10: img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features
     6: image_id image_w image_h num_boxes boxes features          (plain release, no labels)

ids are int64, all else float32; boxes (n, 4) in pixels, features (n, 2048). Files of hundreds of
gigabytes are streamed row by row. Rows are split by hand: csv has a limit on fields and quoting
rules that this format does not.
"""

from __future__ import annotations

import binascii
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.arguments import given_path
from shards.errors import DataError
from shards.format.record import ImageRecord, Labels, Report
from shards.progress import Progress, no_progress
from shards.sources import checks
from shards.sources.aggregated import SentenceStore
from shards.sources.checks import Expected, PartError, checked
from shards.sources.source import Source

_LABELS = ("objects_id", "objects_conf", "attrs_id", "attrs_conf")
COLUMNS = {
    10: ("img_id", "img_h", "img_w", *_LABELS, "num_boxes", "boxes", "features"),
    6: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
}
_LONGEST_ROW = 64 << 20  # bytes; 1,000 boxes have 11 MB: a longer row has lost its line end


def read_tsv(
    features: Iterable[str | Path],
    sentences: Iterable[str | Path],
    *,
    expected: Expected | None = None,
    skip_bad: bool = False,
    report: Report | None = None,
    progress: Progress = no_progress,
) -> Iterator[ImageRecord]:
    """Records of the images that have sentences, in the order of the TSV rows.

    features: TSV files; sentences: aggregated JSON files (`shards.sources.aggregated`).
    skip_bad: bad rows, and sentences of images that are in no TSV, are left out and reported.
    Raises DataError naming file, line and column. Images without sentences are reported.
    """
    report = report if report is not None else Report()
    files = [Path(f) for f in features]
    try:
        total = sum(f.stat().st_size for f in files)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
    store = SentenceStore.load(sentences, report)
    seen: dict[str, str] = {}
    columns = 0
    done = 0
    for path in files:
        for number, line in _rows(path):
            done += len(line)
            progress("bytes read", done, total)
            where = f"{path}, line {number}"
            try:
                cells = line.rstrip(b"\r\n").split(b"\t")
                columns = columns or _layout(cells, where)
                record = _record(cells, columns, where, line, seen, store, expected or Expected())
            except DataError as error:
                if not skip_bad:
                    raise
                report.add("bad rows", str(error))
                continue
            if record is None:
                report.add("images without sentences", cells[0].decode("utf-8", "replace"))
                continue
            yield record
    missing = store.without_features(seen)
    if missing:
        names = ", ".join(missing[:5])
        if not skip_bad:
            raise DataError(
                f"{len(missing)} images have sentences, but no row in the TSVs (first: {names}): "
                "name all feature files, or leave such sentences out with --skip-bad"
            )
        report.add("images with sentences but without features", names, len(missing))


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1 and lines with their ends; DataError when the file cannot be read."""
    try:
        with open(path, "rb", buffering=1 << 20) as f:
            number = 0
            while line := f.readline(_LONGEST_ROW):
                number += 1
                if len(line) == _LONGEST_ROW and not line.endswith(b"\n"):
                    raise DataError(f"{path}, line {number}: the row does not end: not such a TSV")
                yield number, line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _layout(cells: list[bytes], where: str) -> int:
    if len(cells) not in COLUMNS:
        raise DataError(
            f"{where}: {len(cells)} columns, where a bottom-up-attention TSV has 10 (with labels) "
            "or 6"
        )
    return len(cells)


def _record(
    cells: list[bytes],
    columns: int,
    where: str,
    line: bytes,
    seen: dict[str, str],
    store: SentenceStore,
    expected: Expected,
) -> ImageRecord | None:
    """The record of one row; None for an image without sentences, which is not decoded."""
    whole = line.endswith(b"\n")
    names = COLUMNS[columns]
    if len(cells) != columns:
        if len(cells) < columns and not whole:
            raise _truncated(where, names[len(cells) - 1])
        problem = (
            f"column {names[len(cells)]} is missing"
            if len(cells) < columns
            else f"{len(cells)} columns instead of {columns}"
        )
        raise DataError(f"{where}: {problem}: extract or copy the file again")
    try:
        row = dict(zip(names, cells, strict=True))
        image = _text(row, names[0])
        if image in seen:
            raise PartError(names[0], f"image {image} has a row already ({seen[image]})")
        seen[image] = where
        sentences = store.sentences(image)
        if not sentences:
            return None
        return _decode(row, image, columns == 10, sentences, expected)
    except PartError as error:
        # The last column is the long one: a file cut off mostly ends in it.
        if not whole and error.part == names[-1]:
            raise _truncated(where, error.part) from None
        raise DataError(
            f"{where}, column {error.part}: {error}; extract or copy the file again, or leave "
            "such rows out with --skip-bad"
        ) from None


def _truncated(where: str, column: str) -> DataError:
    return DataError(
        f"{where}, column {column}: the last row is truncated: copy the file again, or leave the "
        "row out with --skip-bad"
    )


def _decode(
    row: dict[str, bytes], image: str, with_labels: bool, sentences: tuple, expected: Expected
) -> ImageRecord:
    prefix = "img" if with_labels else "image"
    height, width = _integer(row, f"{prefix}_h"), _integer(row, f"{prefix}_w")
    n = _integer(row, "num_boxes")
    features = _array(row, "features", "<f4", n, expected.feature_dim)
    half = checked("features", checks.half, features)
    pixels = _array(row, "boxes", "<f4", n, 4)
    return ImageRecord(
        image=image,
        width=width,
        height=height,
        boxes=checked("boxes", checks.fractions, pixels, width, height),
        features=half,
        sentences=sentences,
        labels=_labels(row, n, expected) if with_labels else None,
    )


def _labels(row: dict[str, bytes], n: int, expected: Expected) -> Labels:
    def ids(column: str, classes: int) -> NDArray[np.int32]:
        values = _array(row, column, "<i8", n, 1).reshape(n)
        return checked(column, checks.ids, values, classes)

    def confidences(column: str) -> NDArray[np.float32]:
        values = _array(row, column, "<f4", n, 1).reshape(n)
        return checked(column, checks.confidences, values)

    return Labels(
        ids("objects_id", expected.object_classes),
        confidences("objects_conf"),
        ids("attrs_id", expected.attribute_classes),
        confidences("attrs_conf"),
    )


def _text(row: dict[str, bytes], column: str) -> str:
    try:
        text = row[column].decode("utf-8")
    except UnicodeDecodeError:
        raise PartError(column, "it is not UTF-8 text") from None
    if not text:
        raise PartError(column, "it is empty")
    return text


def _integer(row: dict[str, bytes], column: str) -> int:
    cell = row[column]
    if not cell.isdigit() or len(cell) > 9 or int(cell) == 0:
        raise PartError(column, f"{cell[:40].decode('ascii', 'replace')!r} is no positive integer")
    return int(cell)


def _array(row: dict[str, bytes], column: str, dtype: str, n: int, width: int) -> NDArray:
    """The (n, width) array of a base64 cell."""
    try:
        data = binascii.a2b_base64(row[column], strict_mode=True)
    except binascii.Error as error:
        raise PartError(column, f"damaged base64 ({error})") from None
    due = n * width * np.dtype(dtype).itemsize
    if len(data) != due:
        raise PartError(
            column, f"{len(data)} bytes, where {n} boxes × {width} values of {dtype[1:]} are {due}"
        )
    return np.frombuffer(data, dtype).reshape(n, width)


# --- `lxscale shards build tsv` -----------------------------------------------------------------


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--features", nargs="+", required=True, type=given_path, metavar="TSV")
    parser.add_argument("--sentences", nargs="+", required=True, type=given_path, metavar="JSON")


def _read(args: Namespace, report: Report, progress: Progress) -> Iterator[ImageRecord]:
    return read_tsv(
        args.features,
        args.sentences,
        expected=Expected(feature_dim=args.feature_dim),
        skip_bad=args.skip_bad,
        report=report,
        progress=progress,
    )


SOURCE = Source(
    help="bottom-up-attention TSVs and LXMERT's aggregated sentences",
    extractor="bottom-up-attention",
    add_arguments=_add_arguments,
    read=_read,
)
