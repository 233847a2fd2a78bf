"""Parquet files, and data sets that Hugging Face's `datasets` saved to disk.

A row an image; columns are found by the usual names (`COLUMNS`) or named by settings:

    features    (lists of) lists of n × D numbers, fixed sizes or not, or raw float32 or float16
    boxes       the same of n × 4, or raw float32: x1 y1 x2 y2
    sentences   a text, texts, or structs {"text", "source", "id", "answers"}
    …           ids, sizes, counts and labels as in shards/sources/detections.py

Places are a .parquet or .arrow file, a folder of .parquet, and a folder that `save_to_disk` wrote:
a split, or all (each image is of its folder's split then). Read with pyarrow alone, a few rows at a
time; of a Parquet file with one row group of everything, each part of a build reads what comes
before it, too: row groups of a thousand rows are good. In memory while it is listed: the ids and
sentences of a row group.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.record import Sentence, check_sentence
from shards.sources import detections
from shards.sources.arrow_tables import Table, cell, named, opened, seeker
from shards.sources.checks import PartError
from shards.sources.detections import LABELS_SETTING, NAMES, image_name, wants_labels
from shards.sources.image_sizes import SETTINGS, ImageSizes, given_sizes, missing_size
from shards.sources.regions import Entry, FeatureFormat, Options, Reader, Regions
from shards.store import objects

_STATE, _SPLITS = "state.json", "dataset_dict.json"

COLUMNS: dict[str, tuple[str, ...]] = {
    **{part: names for part, names in NAMES.items() if part != "fractions"},
    "image": (*NAMES["image"], "image", "id", "file_name"),
    "sentences": ("sentences", "captions", "caption", "texts", "text", "questions", "question"),
    "split": ("split",),
}
"""By part, the names that are tried."""


# --- which files --------------------------------------------------------------------------------


def _detect(place: str) -> bool:
    path = objects.local_path(place)
    if path is None:
        return False
    if path.is_dir():
        saved = (path / _STATE).is_file() or (path / _SPLITS).is_file()
        return saved or any(True for _ in path.glob("*.parquet"))
    return path.is_file() and path.name.endswith((".parquet", ".arrow"))


def _files(place: str) -> list[str]:
    path = objects.local_path(place)
    if path is None or not path.is_dir():
        return [place]
    if (path / _SPLITS).is_file():
        names = _json(path / _SPLITS).get("splits")
        if not isinstance(names, list) or not all(map(_plain_name, names)):
            raise DataError(f"{path / _SPLITS} has no names of splits; copy it again")
        found = [file for name in names for file in _saved(path / name)]
    elif (path / _STATE).is_file():
        found = _saved(path)
    else:
        found = sorted(path.glob("*.parquet"))
    if not found:
        raise DataError(f"the folder {place} has no Parquet or Arrow files")
    return [str(p) for p in found]


def _saved(folder: Path) -> list[Path]:
    """The files of a split that `save_to_disk` wrote, in their order."""
    files = _json(folder / _STATE).get("_data_files")
    listed = files if isinstance(files, list) else []
    names: list[Any] = [f.get("filename") for f in listed if isinstance(f, dict)]
    if not names or not all(map(_plain_name, names)):
        raise DataError(f"{folder / _STATE} names no data files; copy it again")
    return [folder / name for name in names]


def _plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(document, dict):
        raise DataError(f"{path} is no JSON object; copy it again")
    return document


def _split_of(path: Path) -> str | None:
    """The split of a file in a data set of splits: its folder."""
    return path.parent.name if (path.parent.parent / _SPLITS).is_file() else None


# --- columns ------------------------------------------------------------------------------------


def _columns(table: Table, options: Options, path: str) -> dict[str, str]:
    """The column of each part that the table has."""
    out = {}
    for part, names in COLUMNS.items():
        given = options.settings.get(_setting(part))
        if given is not None and given not in table.names:
            raise DataError(
                f"{path} has no column {given!r:.60}: it has {', '.join(table.names)[:200]}"
            )
        found = given or next((n for n in names if n in table.names), None)
        if found is not None:
            out[part] = found
    for part in ("image", "features", "boxes"):
        if part not in out:
            raise DataError(
                f"{path} has no column of {part} by a usual name: it has "
                f"{', '.join(table.names)[:200]}; say --feature-option {_setting(part)}=COLUMN"
            )
    return out


def _setting(part: str) -> str:
    return part.replace("_", "-")


# --- listing ------------------------------------------------------------------------------------


def _entries(path: str, options: Options) -> Iterator[Entry]:
    _pixels(options)
    wants_labels(options)
    sizes = given_sizes(options.settings)
    folder_split = _split_of(Path(path))
    with opened(path) as table:
        columns = _columns(table, options, path)
        parts: list[str] = [p for p in ("image", "sentences", "split", "count") if p in columns]
        chosen = list(dict.fromkeys(columns[p] for p in parts))
        number = 0
        for group in range(table.groups):
            row = 0
            for batch in table.batches(group, chosen):
                for values in batch.to_pylist():
                    number += 1
                    found = {p: values[columns[p]] for p in parts}
                    position = f"{group} {row}"
                    yield _entry(found, position, f"row {number}", folder_split, sizes, options)
                    row += 1


def _entry(
    found: Mapping[str, Any],
    position: str,
    where: str,
    split: str | None,
    sizes: ImageSizes,
    options: Options,
) -> Entry:
    try:
        image = image_name(found["image"])
        said = found.get("split")
        if said is not None and not isinstance(said, str):
            raise ValueError(f"its split is {said!r:.40}")
        sentences, empty = _sentences(found.get("sentences"), options)
    except ValueError as error:
        return Entry("", position, where, problem=str(error))
    width, height = sizes.of(image) or (0, 0)
    count = found.get("count")
    return Entry(
        image,
        f"{position} {width} {height}",
        where,
        count if isinstance(count, int) and 0 < count < 1 << 31 else 0,
        sentences=sentences,
        split=said or split,
        empty_sentences=empty,
    )


def _sentences(value: Any, options: Options) -> tuple[tuple[Sentence, ...], int]:
    """Sentences, and how many are empty."""
    entries = value if isinstance(value, list) else [] if value is None else [value]
    source = options.settings.get("source", "parquet")
    out, empty = [], 0
    for i, entry in enumerate(entries):
        given = {"text": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict):
            raise ValueError(f"sentence {i} is {entry!r:.40}")
        # Structs have all fields: those that a row lacks are null.
        given = {k: v for k, v in given.items() if v is not None}
        answers = given.get("answers")
        if isinstance(answers, dict):
            given["answers"] = {k: v for k, v in answers.items() if v is not None}
        elif isinstance(answers, list):  # an Arrow map
            given["answers"] = dict(a for a in answers if isinstance(a, tuple) and len(a) == 2)
        if not str(given.get("text", "x")).strip():
            empty += 1
            continue
        out.append(check_sentence(given, f"sentence {i}", source))
    return tuple(out), empty


# --- an image -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _reader(path: str, options: Options) -> Iterator[Reader]:
    pixels = _pixels(options)
    with opened(path) as table:
        columns = _columns(table, options, path)
        parts = [p for p in columns if p not in ("sentences", "split")]
        seek = seeker(table, list(dict.fromkeys(columns[p] for p in parts)))

        def read(entry: Entry) -> Regions:
            group, row, width, height = map(int, entry.position.split())
            batch, at = seek(group, row)
            with named(path):
                found = {NAMES[p][0]: _cell(p, batch.column(columns[p]), at) for p in parts}
            _matrices(found, options)
            size = (width, height) if width else None
            if size is None and detections.size_of(found) is None:
                raise ValueError(missing_size(options.settings))
            image = image_name(found[NAMES["image"][0]])
            return detections.regions(image, found, options, size, pixels)

        yield read


def _cell(part: str, column: Any, row: int) -> Any:
    try:
        return cell(column, row)
    except ValueError as error:
        raise PartError(part, str(error)) from None


def _matrices(found: dict[str, Any], options: Options) -> None:
    """Gives boxes and features their rows, where cells are flat lists or raw memory."""
    for part, width in (("boxes", 4), ("features", options.feature_dim)):
        value = found.get(part)
        if isinstance(value, bytes):
            value = _of_memory(part, value, width, found)
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.size % width == 0:
            value = value.reshape(-1, width)
        found[part] = value


def _of_memory(part: str, data: bytes, width: int, found: dict[str, Any]) -> NDArray:
    """Boxes are float32; features float16 where that makes as many rows as there are boxes."""
    kind = "<f4"
    if part == "features" and isinstance(boxes := found["boxes"], np.ndarray):
        kind = "<f2" if len(data) == boxes.size // 4 * width * 2 else "<f4"
    if len(data) % (width * np.dtype(kind).itemsize):
        raise PartError(part, f"{len(data):,} bytes are no rows of {width} numbers")
    return np.frombuffer(data, kind).reshape(-1, width)


def _pixels(options: Options) -> bool:
    unit = options.settings.get("boxes-in", "pixels")
    if unit not in ("pixels", "fractions"):
        raise DataError(f"boxes-in={unit:.40}: give pixels or fractions")
    return unit == "pixels"


def _help(part: str) -> str:
    return f"column of it ({', '.join(COLUMNS[part])})"


FORMAT = FeatureFormat(
    name="parquet",
    help="Parquet files, and data sets of Hugging Face's `datasets` saved to disk",
    extractor="unknown",
    detect=_detect,
    files=_files,
    entries=_entries,
    reader=_reader,
    settings={
        **{_setting(part): _help(part) for part in COLUMNS},
        "boxes-in": "pixels, or fractions of width and height (pixels)",
        "source": "set of the sentences that name none (parquet)",
        **SETTINGS,
        **LABELS_SETTING,
    },
)
