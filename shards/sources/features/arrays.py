"""A folder of .npz or .npy, a file an image.

    NAME.npz                     arrays by name, as bottom-up-attention's extractors write them:
                                 x or features, bbox or boxes, num_bbox, image_h, image_w, …
    NAME.npy, NAME_info.npy      features, and a dict of the rest (MMF, Pythia)
    NAME.npy                     a dict with the features in it (ViLBERT)
    NAME.npy                     features; boxes are in the same file of a folder that the user
                                 names (boxes=FOLDER)

The names of the parts are in shards/sources/detections.py. Dicts in .npy are pickles, read by
shards/sources/restricted_pickle.py, which runs nothing; in a .npz (`info`) they are passed over.
Sizes that the files do not have are given by the user (shards/sources/image_sizes.py). An image's
id is the file's name in the folder without its end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.sources import restricted_pickle
from shards.sources.detections import (
    LABELS_SETTING,
    NAMES,
    find,
    image_name,
    regions,
    size_of,
    wants_labels,
)
from shards.sources.image_sizes import SETTINGS, given_sizes, missing_size
from shards.sources.npy import read_npy, read_npz
from shards.sources.regions import (
    Entry,
    FeatureFormat,
    Options,
    Reader,
    Regions,
    file_version,
    one_file,
)
from shards.store import objects

_INFO = "_info.npy"
_LARGEST = 256 << 20  # bytes of a file; 1,000 boxes have 8 MB of features
_KNOWN = frozenset(name for names in NAMES.values() for name in names)
_UNITS = {"pixels": True, "fractions": False}


def _detect(place: str) -> bool:
    path = objects.local_path(place)
    return path is not None and path.is_dir() and any(True for _ in _files(str(path)))


def _files(folder: str) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """The images below a folder: their files' names relative to it, in order, and the files that
    they have; links to folders are not followed. DataError where the folder cannot be read."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None
    infos = {e.name: e for e in entries if e.name.endswith(_INFO)}
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            for name, files in _files(entry.path):
                yield f"{entry.name}/{name}", files
        elif entry.name.endswith((".npz", ".npy")) and entry.name not in infos and entry.is_file():
            info = infos.get(entry.name.removesuffix(".npy") + _INFO)
            yield entry.name, [entry, info] if info else [entry]


def _entries(folder: str, options: Options) -> Iterator[Entry]:
    _settings(options)
    sizes = given_sizes(options.settings)
    for name, files in _files(folder):
        try:
            image = image_name(name[:-4])
            version = " ".join(file_version(file.stat()) for file in files)
        except (OSError, ValueError) as error:
            yield Entry("", "", ascii(name), problem=f"it cannot be read: {error}")
            continue
        width, height = sizes.of(image) or (0, 0)
        yield Entry(image, f"{width} {height} {name}", name, version=version)


@contextlib.contextmanager
def _reader(folder: str, options: Options) -> Iterator[Reader]:
    pixels, boxes = _settings(options)

    def read(entry: Entry) -> Regions:
        width, height, name = entry.position.split(" ", 2)
        parts = _parts(Path(folder) / name)
        if boxes and find(parts, "boxes") is None:
            parts["boxes"] = _array(Path(boxes) / name)
        size = (int(width), int(height)) if int(width) else None
        if size is None and size_of(parts) is None:
            raise ValueError(missing_size(options.settings))
        return regions(entry.image, parts, options, size, pixels)

    yield read


def _settings(options: Options) -> tuple[bool, str | None]:
    """Whether boxes are in pixels, and the folder that has them."""
    wants_labels(options)
    unit = options.settings.get("boxes-in", "pixels")
    if unit not in _UNITS:
        raise DataError(f"boxes-in={unit:.40}: give pixels or fractions")
    boxes = options.settings.get("boxes")
    if boxes is not None and not os.path.isdir(boxes):
        raise DataError(f"boxes={boxes}: there is no such folder")
    return _UNITS[unit], boxes


def _parts(path: Path) -> dict[str, Any]:
    """The parts of an image that a file, and perhaps one beside it, has."""
    data = _read(path)
    if path.suffix == ".npz":
        return dict(read_npz(data, _KNOWN.__contains__))
    array = read_npy(data)
    parts: dict[str, Any] = {}
    if isinstance(array, bytes):
        parts = _dict(path.name, array)
    info = path.with_name(path.name.removesuffix(".npy") + _INFO)
    if info.exists():
        packed = read_npy(_read(info))
        parts |= _dict(info.name, packed) if isinstance(packed, bytes) else {}
    if isinstance(array, np.ndarray):
        parts["features"] = array
    return parts


def _array(path: Path) -> Any:
    array = read_npy(_read(path))
    if isinstance(array, bytes):
        raise ValueError(f"{path} is no array of numbers")
    return array


def _dict(name: str, packed: bytes) -> dict[str, Any]:
    try:
        found = restricted_pickle.loads(packed, boxed=True)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no dict of an image")
    return found


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as f:
            data = f.read(_LARGEST + 1)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise ValueError(f"{path.name} has more than {_LARGEST:,} bytes: it is no image's")
    return data


FORMAT = FeatureFormat(
    name="arrays",
    help="a folder of .npz or .npy, a file an image, of bottom-up-attention, MMF or ViLBERT",
    extractor="unknown",
    detect=_detect,
    files=one_file,
    entries=_entries,
    reader=_reader,
    settings={
        "boxes": "folder with a .npy of boxes of the same name for each .npy of features",
        "boxes-in": "pixels, or fractions of width and height (pixels)",
        **SETTINGS,
        **LABELS_SETTING,
    },
)
