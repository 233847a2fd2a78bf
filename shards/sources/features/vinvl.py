"""VinVL TSV: features beside predictions, an image a row, and where rows begin in a .lineidx.

    features.tsv, *.feature.tsv      id, number of boxes, base64 of float32 (n, 2054)
                                     id, {"num_boxes", "features": base64}           (Oscar's tasks)
    predictions.tsv, *.label.tsv     id, {"objects": [{"rect", "class", "conf"}, …], "image_h",
                                     "image_w"}, or that list alone
    predictions.tsv                  the same with a "feature" in each object, and no other file:
                                     as scene_graph_benchmark writes it

The last six columns of 2054 are the box over width and height, and width and height of the box.
Boxes are the predictions' in pixels where there are any, else these. Files of features and of
predictions have the same images in the same order. Sizes are the predictions', else those of
`*.hw.tsv` or another file that the user names (shards/sources/image_sizes.py), else they follow
from boxes that are there in both units.

Classes are words: with the detector's label map (`labelmap=FILE`: VinVL's has "label_to_idx" and
"attribute_to_idx", from 1 on), objects get labels. Of several attributes the surest counts; an
object without one has attribute 0 with confidence 0, which gives it no weight.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.record import Labels
from shards.sources import checks, detections
from shards.sources.checks import PartError, checked
from shards.sources.image_sizes import SETTINGS, given_sizes, load_sizes, missing_size
from shards.sources.json_stream import pairs
from shards.sources.regions import (
    Entry,
    FeatureFormat,
    Options,
    Reader,
    Regions,
    file_version,
)
from shards.sources.tsv_rows import HEAD, LONGEST_ROW, Row, opened, rows_of
from shards.store import objects

_GEOMETRY = 6  # columns after the features
_FEATURES = ("features.tsv", "feature.tsv")
_PREDICTIONS = "predictions.tsv"
_LABELS = ("label.tsv", "labels.tsv", _PREDICTIONS)
_COUNT = re.compile(rb'"num_boxes":\s*(\d{1,9})[,}]')
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="


# --- which files --------------------------------------------------------------------------------


def _detect(place: str) -> bool:
    path = objects.local_path(place)
    if path is None:
        return False
    return bool(_in_folder(path)) if path.is_dir() else path.is_file() and _has_features(path)


def _has_features(path: Path) -> bool:
    """Whether the first row of a file is one of features."""
    with open(path, "rb") as f:
        cells = f.read(HEAD).split(b"\n")[0].split(b"\t")
    if len(cells) == 2:
        return cells[1].startswith(b"{") and b'"feature' in cells[1]
    good = len(cells) == 3 and cells[1].isdigit() and len(cells[2]) > 8
    return good and not cells[2].strip().translate(None, _BASE64)


def _in_folder(folder: Path) -> list[Path]:
    """The files of features in a folder."""
    names = sorted(folder.glob("*.tsv"))
    found = [p for p in names if p.name.endswith(_FEATURES) and _has_features(p)]
    alone = folder / _PREDICTIONS
    return found or ([alone] if alone.is_file() and _has_features(alone) else [])


def _files(place: str) -> list[str]:
    path = objects.local_path(place)
    try:
        found = _in_folder(path) if path is not None and path.is_dir() else [Path(place)]
    except OSError as error:
        raise DataError(f"cannot read {error.filename or place}: {error.strerror}") from None
    if not found:
        raise DataError(f"the folder {place} has no features.tsv or *.feature.tsv of VinVL")
    return [str(p) for p in found]


def _beside(path: Path, ends: tuple[str, ...]) -> Path | None:
    """The file of the same set with another end: train.label.tsv of train.feature.tsv."""
    end = next((e for e in _FEATURES if path.name.endswith(e)), None)
    if end is None:
        return None
    stem = path.name.removesuffix(end)
    return next((p for e in ends if (p := path.with_name(stem + e)).is_file()), None)


def _predictions(path: str, options: Options) -> str | None:
    """The file of predictions, where there is one beside the features."""
    if given := options.settings.get("predictions"):
        return given
    found = _beside(Path(path), _LABELS)
    return str(found) if found else None


# --- listing --------------------------------------------------------------------------------------


def _entries(path: str, options: Options) -> Iterator[Entry]:
    _label_map(options)
    predictions = _predictions(path, options)
    sizes = given_sizes(options.settings)
    if not sizes and (found := _beside(Path(path), ("hw.tsv",))):
        sizes = type(sizes)(load_sizes(str(found)))
    listed = rows_of(predictions) if predictions else itertools.repeat(None)
    version = _version(predictions) if predictions else ""
    for number, row in enumerate(rows_of(path), 1):
        label = next(listed, None)
        if predictions and (label is None or label.id() != row.id()):
            there = "no row" if label is None else f"image {_shown(label)}"
            raise DataError(
                f"{predictions} has {there} where line {number} of {path} has image "
                f"{_shown(row)}: they are not of one set, or one is damaged; name the right file "
                "with --feature-option predictions=FILE"
            )
        where = f"line {number}"
        try:
            image = detections.image_name(row.id())
            cells = row.head.split(b"\t")
            if len(cells) < 2:
                raise ValueError("it has one column: not such a TSV, or damaged")
            width, height = sizes.of(image) or (0, 0)
        except ValueError as error:
            yield Entry("", "", where, problem=str(error))
            continue
        position = f"{row.at} {label.at if label else -1} {width} {height}"
        yield Entry(image, position, where, _count(cells), version=version)


def _version(path: str) -> str:
    try:
        return file_version(Path(path).stat())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _shown(row: Row) -> str:
    return repr(row.id()[:60].decode("utf-8", "replace"))


def _count(cells: list[bytes]) -> int:
    if len(cells) > 2:
        return int(cells[1]) if cells[1].isdigit() and len(cells[1]) < 10 else 0
    match = _COUNT.search(cells[1])
    return int(match[1]) if match else 0


# --- an image -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _reader(path: str, options: Options) -> Iterator[Reader]:
    labels = _label_map(options)
    with ExitStack() as stack:
        file = stack.enter_context(opened(path))
        predictions = _predictions(path, options)
        beside = stack.enter_context(opened(predictions)) if predictions else None

        def read(entry: Entry) -> Regions:
            at, label_at, width, height = map(int, entry.position.split())
            cells = _cells(file, at)
            predicted = None
            if beside is not None:
                name, row = Path(beside.name).name, _cells(beside, label_at)
                if row[0] != cells[0]:
                    raise PartError(name, "it has another image there than when it was listed")
                predicted = _json(name, row[-1])
            size = (width, height) if width else None
            return _regions(cells, predicted, size, labels, options)

        yield read


def _cells(f: IO[bytes], at: int) -> list[bytes]:
    f.seek(at)
    cells = f.readline(LONGEST_ROW).rstrip(b"\r\n").split(b"\t")
    if len(cells) not in (2, 3):
        raise ValueError(f"{len(cells)} columns, where 2 or 3 are due: it is cut off or damaged")
    return cells


def _json(part: str, cell: bytes) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise PartError(part, f"it is cut off, or no JSON ({error!s:.100})") from None


def _regions(
    cells: list[bytes],
    predicted: Any,
    size: tuple[int, int] | None,
    labels: _LabelMap | None,
    options: Options,
) -> Regions:
    if len(cells) == 3:
        given: Any = {"num_boxes": cells[1], "features": cells[2]}
    else:
        given = _json("column 2", cells[1])
    predicted = given if predicted is None else predicted
    found, size = _objects(predicted), _predicted_size(predicted) or size
    features, geometry = _features(given, found, options.feature_dim)
    if found:
        if len(found) != len(features):
            raise PartError("objects", f"{len(found)} of them, where features has {len(features)}")
        pixels = detections.rows("rect", [o.get("rect") for o in found], 4)
        size = size or _implied_size(pixels, geometry)
        boxes, unit = pixels, True
    elif geometry is not None:
        boxes, unit = geometry[:, :4], False
    else:
        raise ValueError("it has no boxes: neither predictions nor six columns of them")
    if size is None:
        raise ValueError(missing_size(options.settings))
    return Regions(
        image=detections.image_name(cells[0]),
        width=size[0],
        height=size[1],
        boxes=checked("rect" if unit else "features", checks.fractions, boxes, *size, unit),
        features=features,
        labels=_labels(found, labels, options) if labels and found else None,
    )


def _objects(predicted: Any) -> list[dict[str, Any]]:
    found = predicted.get("objects", []) if isinstance(predicted, dict) else predicted
    if not isinstance(found, list) or not all(isinstance(o, dict) for o in found):
        raise PartError("objects", "it is no list of objects with rect and class")
    return found


def _predicted_size(predicted: Any) -> tuple[int, int] | None:
    return detections.size_of(predicted) if isinstance(predicted, dict) else None


def _features(given: Any, found: list[dict[str, Any]], dim: int) -> tuple[NDArray, NDArray | None]:
    """(n, dim), and (n, 6) of geometry where there are further columns."""
    if not isinstance(given, dict):
        raise ValueError("its features are no base64, or JSON of it")
    if "features" in given:
        n = detections.whole("num_boxes", given.get("num_boxes"))
        array = detections.rows("features", given["features"], 1).reshape(-1)
        if array.size % n:
            raise PartError("features", f"{array.nbytes:,} bytes are no {n} rows of float32")
    elif found and all("feature" in o for o in found):
        n = len(found)
        parts = [detections.rows("feature", o["feature"], 1).reshape(-1) for o in found]
        if len({p.size for p in parts}) > 1:
            raise PartError("feature", "objects have features of different widths")
        array = np.concatenate(parts)
    else:
        raise ValueError("it has no features")
    width = array.size // n
    if width not in (dim, dim + _GEOMETRY):
        raise PartError(
            "features",
            f"{width} columns, where {dim} or, with boxes, {dim + _GEOMETRY} are due, "
            "or the number of boxes is wrong; see --feature-dim",
        )
    table = array.reshape(n, width)
    return table[:, :dim], table[:, dim:] if width > dim else None


def _implied_size(pixels: NDArray, geometry: NDArray | None) -> tuple[int, int] | None:
    """The size by which boxes in pixels are those over width and height."""
    if geometry is None or len(geometry) != len(pixels):
        return None
    size = []
    for end in (2, 3):
        usable = np.isfinite(geometry[:, end]) & (geometry[:, end] > 1e-3) & (pixels[:, end] > 0)
        if not usable.any():
            return None
        ratio = np.asarray(pixels[usable, end], np.float64) / geometry[usable, end]
        if not 0.5 < float(np.median(ratio)) < 1 << 30:
            return None
        size.append(max(1, round(float(np.median(ratio)))))
    return size[0], size[1]


# --- labels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LabelMap:
    """Numbers of words, from 1 on."""

    classes: Mapping[str, int]
    attributes: Mapping[str, int]


def _label_map(options: Options) -> _LabelMap | None:
    path = options.settings.get("labelmap")
    attributes = options.settings.get("attributes", "yes")
    if attributes not in ("yes", "no"):
        raise DataError(f"attributes={attributes:.40}: give yes or no")
    if path is None:
        return None
    found = {k: v for k, v in pairs(path, "label map") if k in ("label_to_idx", "attribute_to_idx")}
    for words in found.values():
        if not isinstance(words, dict) or not all(type(n) is int for n in words.values()):
            raise DataError(f"the label map {path} has words without numbers")
    if "label_to_idx" not in found:
        raise DataError(
            f"the label map {path} has no label_to_idx: give VinVL's, as it is published"
        )
    return _LabelMap(
        found["label_to_idx"], found.get("attribute_to_idx", {}) if attributes == "yes" else {}
    )


def _labels(found: list[dict[str, Any]], words: _LabelMap, options: Options) -> Labels:
    n = len(found)
    ids, (attributes, sureness) = np.zeros(n, np.int32), detections.unknown(n)
    for i, one in enumerate(found):
        number = words.classes.get(str(one.get("class")))
        if number is None:
            raise PartError("class", f"{str(one.get('class'))!r:.60} is not in the label map")
        ids[i] = number - 1
        names, scores = one.get("attributes") or [], one.get("attr_scores") or []
        if words.attributes and names and len(names) == len(scores):
            _, name = max(zip(_numbers("attr_scores", scores), names, strict=True))
            known = words.attributes.get(str(name), 0)
            if known:
                attributes[i], sureness[i] = known - 1, max(scores)
    confidences = _numbers("conf", [one.get("conf") for one in found])
    return Labels(
        checked("class", checks.ids, ids, options.object_classes),
        checked("conf", checks.confidences, confidences),
        checked("attributes", checks.ids, attributes, options.attribute_classes),
        checked("attr_scores", checks.confidences, sureness),
    )


def _numbers(part: str, values: Any) -> NDArray[np.float32]:
    return detections.rows(part, values, 1).reshape(-1).astype(np.float32)


FORMAT = FeatureFormat(
    name="vinvl",
    help="VinVL TSV: features.tsv with predictions.tsv, or *.feature.tsv with *.label.tsv",
    extractor="vinvl",
    detect=_detect,
    files=_files,
    entries=_entries,
    reader=_reader,
    settings={
        "predictions": "file of predictions, where it is not beside the features",
        "labelmap": "VinVL's JSON of classes and attributes: objects get labels by it",
        "attributes": "yes or no: those of the label map, too (yes)",
        **SETTINGS,
    },
)
