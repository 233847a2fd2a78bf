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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.record import ImageRecord, Labels, Report
from shards.sources.aggregated import SentenceStore

EXTRACTOR = "bottom-up-attention"
Progress = Callable[[int, int | None], None]

_LABELS = ("objects_id", "objects_conf", "attrs_id", "attrs_conf")
COLUMNS = {
    10: ("img_id", "img_h", "img_w", *_LABELS, "num_boxes", "boxes", "features"),
    6: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
}
_TOLERANCE = 1.0  # pixels that a box may reach out of its image; it is clamped
_LONGEST_ROW = 64 << 20  # bytes; 1,000 boxes have 11 MB: a longer row has lost its line end


class _CellError(ValueError):
    def __init__(self, column: str, problem: str) -> None:
        super().__init__(problem)
        self.column = column


@dataclass(frozen=True)
class Expected:
    """What rows are checked against: width of a feature, number of object and attribute classes."""

    feature_dim: int = 2048
    object_classes: int = 1600
    attribute_classes: int = 400


def read_tsv(
    features: Iterable[str | Path],
    sentences: Iterable[str | Path],
    *,
    expected: Expected | None = None,
    skip_bad: bool = False,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Iterator[ImageRecord]:
    """Records of the images that have sentences, in the order of the TSV rows.

    features: TSV files; sentences: aggregated JSON files (`shards.sources.aggregated`).
    skip_bad: bad rows, and sentences of images that are in no TSV, are left out and reported.
    progress: called with (bytes done, all bytes) of the TSVs.
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
            if progress:
                progress(done, total)
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
            raise _CellError(names[0], f"image {image} has a row already ({seen[image]})")
        seen[image] = where
        sentences = store.sentences(image)
        if not sentences:
            return None
        return _decode(row, image, columns == 10, sentences, expected)
    except _CellError as error:
        # The last column is the long one: a file cut off mostly ends in it.
        if not whole and error.column == names[-1]:
            raise _truncated(where, error.column) from None
        raise DataError(
            f"{where}, column {error.column}: {error}; extract or copy the file again, or leave "
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
    # Values beyond float16 become infinite here; the check below finds those and NaN alike.
    with np.errstate(over="ignore", invalid="ignore"):
        half = features.astype(np.float16)
    if not np.isfinite(half).all():
        i, j = np.argwhere(~np.isfinite(half))[0]
        raise _CellError(
            "features", f"object {i} has {features[i, j]}, which is no finite float16 value"
        )
    return ImageRecord(
        image=image,
        width=width,
        height=height,
        boxes=_boxes(row, n, width, height),
        features=half,
        sentences=sentences,
        labels=_labels(row, n, expected) if with_labels else None,
    )


def _boxes(row: dict[str, bytes], n: int, width: int, height: int) -> NDArray[np.float32]:
    pixels = _array(row, "boxes", "<f4", n, 4)
    size = np.asarray([width, height, width, height], dtype=np.float32)
    good = np.isfinite(pixels) & (pixels >= -_TOLERANCE) & (pixels <= size + _TOLERANCE)
    if not good.all():
        i = int(np.argwhere(~good)[0][0])
        raise _CellError(
            "boxes", f"box {i} is {pixels[i].tolist()}, outside of the {width} × {height} image"
        )
    boxes = np.clip(pixels / size, 0.0, 1.0).astype(np.float32)
    turned = (boxes[:, 0] > boxes[:, 2]) | (boxes[:, 1] > boxes[:, 3])
    if turned.any():
        i = int(np.argmax(turned))
        raise _CellError("boxes", f"box {i} is {pixels[i].tolist()}, which is not x1 y1 x2 y2")
    return boxes


def _labels(row: dict[str, bytes], n: int, expected: Expected) -> Labels:
    def ids(column: str, classes: int) -> NDArray[np.int32]:
        values = _array(row, column, "<i8", n, 1).reshape(n)
        if values.min() < 0 or values.max() >= classes:
            raise _CellError(
                column, f"ids run from {values.min()} to {values.max()}, not in 0..{classes - 1}"
            )
        return values.astype(np.int32)

    def confidences(column: str) -> NDArray[np.float32]:
        values = _array(row, column, "<f4", n, 1).reshape(n)
        # Softmax output: a rounding error above 1 is let through.
        if not ((values >= 0) & (values <= 1.001)).all():
            raise _CellError(column, "a confidence is not in 0..1")
        return values

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
        raise _CellError(column, "it is not UTF-8 text") from None
    if not text:
        raise _CellError(column, "it is empty")
    return text


def _integer(row: dict[str, bytes], column: str) -> int:
    cell = row[column]
    if not cell.isdigit() or len(cell) > 9 or int(cell) == 0:
        raise _CellError(column, f"{cell[:40].decode('ascii', 'replace')!r} is no positive integer")
    return int(cell)


def _array(row: dict[str, bytes], column: str, dtype: str, n: int, width: int) -> NDArray:
    """The (n, width) array of a base64 cell."""
    try:
        data = binascii.a2b_base64(row[column], strict_mode=True)
    except binascii.Error as error:
        raise _CellError(column, f"damaged base64 ({error})") from None
    due = n * width * np.dtype(dtype).itemsize
    if len(data) != due:
        raise _CellError(
            column, f"{len(data)} bytes, where {n} boxes × {width} values of {dtype[1:]} are {due}"
        )
    return np.frombuffer(data, dtype).reshape(n, width)
