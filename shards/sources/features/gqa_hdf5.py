"""GQA's object features.

`gqa_objects_info.json` has {imageId: {"width", "height", "objectsNum", "idx", "file"}}, and
`gqa_objects_{file}.h5` at `idx`:

    features   (N, 100, 2048) float32
    bboxes     (N, 100, 4) float32: x1 y1 x2 y2 in pixels

of which the first `objectsNum` are objects. An image's id is a bare number, of Visual Genome
mostly (`--numbers vg`), or `n` and a number. Images are listed by file and place, so that files are
read from one end to the other. In memory while they are listed: about 400 bytes an image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.sources import checks
from shards.sources.checks import PartError, checked
from shards.sources.json_stream import head, pairs
from shards.sources.libraries import library
from shards.sources.regions import (
    Entry,
    FeatureFormat,
    Options,
    Reader,
    Regions,
    file_version,
)
from shards.store import objects

_INFO = "_info.json"
_KEYS = ("width", "height", "objectsNum", "idx", "file")
_WHAT = "file of GQA's images"
_LARGEST_CHUNK = 1 << 30  # bytes that HDF5 may unpack at a time


def _detect(place: str) -> bool:
    path = objects.local_path(place)
    return path is not None and (info := _info(path)) is not None and b'"objectsNum"' in head(info)


def _info(path: Path) -> Path | None:
    """The file of images of a folder, or the one that is named."""
    if path.is_dir():
        return next((p for p in sorted(path.glob(f"*objects{_INFO}"))), None)
    return path if path.is_file() and path.name.endswith(_INFO) else None


def _files(place: str) -> list[str]:
    path = objects.local_path(place)
    info = _info(path) if path is not None else None
    if info is None:
        raise DataError(
            f"{place} has no gqa_objects_info.json: give the folder that has it and the .h5 files"
        )
    return [str(info)]


def _entries(info: str, options: Options) -> Iterator[Entry]:
    found: list[tuple[int, int, str, int, int, int]] = []
    versions: dict[int, str] = {}
    for image, value in pairs(info, _WHAT):
        numbers: list[Any] = [value.get(k) for k in _KEYS] if isinstance(value, dict) else [None]
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise DataError(
                f"the {_WHAT} {info}, image {image:.60}: it has no {', '.join(_KEYS)} as numbers"
            )
        width, height, count, row, file = numbers
        found.append((file, row, image, width, height, count))
    found.sort()
    for file, row, image, width, height, count in found:
        if file not in versions:
            versions[file] = _version(_h5(info, file))
        problem = "" if width and height and count else "it has no objects, width or height"
        yield Entry(
            image,
            f"{file} {row} {width} {height} {count}",
            f"image {image}",
            count,
            problem=problem,
            version=versions[file],
        )


def _h5(info: str, file: int) -> str:
    return f"{info.removesuffix(_INFO)}_{file}.h5"


def _version(path: str) -> str:
    try:
        return file_version(Path(path).stat())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


@contextlib.contextmanager
def _reader(info: str, options: Options) -> Iterator[Reader]:
    h5py = library("h5py", "GQA's features")
    with ExitStack() as stack:
        opened: tuple[int, Any] = (-1, None)

        def read(entry: Entry) -> Regions:
            nonlocal opened
            file, row, width, height, count = map(int, entry.position.split())
            if opened[0] != file:
                stack.close()
                opened = (-1, None)
                path = _h5(info, file)
                try:
                    opened = (file, stack.enter_context(h5py.File(path, "r")))
                except OSError as error:
                    raise DataError(f"cannot read {path}: {error}; copy it again") from None
            pixels = _rows(h5py, opened[1], "bboxes", row, count, 4)
            return Regions(
                image=entry.image,
                width=width,
                height=height,
                boxes=checked("bboxes", checks.fractions, pixels, width, height),
                features=_rows(h5py, opened[1], "features", row, count, options.feature_dim),
            )

        yield read


def _rows(h5py: Any, file: Any, name: str, row: int, count: int, width: int) -> Any:
    """The first rows of an image in one of the file's arrays."""
    try:
        # Links and arrays may lie in other files, which nobody named.
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise PartError(name, "there is no such array in the file")
        array = file[name]
        if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external:
            raise PartError(name, "it is no array of this file")
        if array.ndim != 3 or array.shape[2] != width or array.dtype.kind != "f":
            hint = "; see --feature-dim" if name == "features" else ""
            raise PartError(
                name, f"shape {array.shape} of {array.dtype} where (images, objects, {width}) is "
                f"due{hint}"
            )  # fmt: skip
        if row >= array.shape[0] or count > array.shape[1]:
            raise PartError(
                name, f"{count} objects of row {row} are not in an array of shape {array.shape}"
            )
        chunk = array.dtype.itemsize
        for n in array.chunks or ():
            chunk *= n
        if chunk > _LARGEST_CHUNK:
            raise PartError(name, f"it is in chunks of {chunk:,} bytes, too large to be unpacked")
        return array[row, :count]
    except (OSError, RuntimeError, KeyError, TypeError, MemoryError) as error:
        raise PartError(name, f"it cannot be read ({error}); copy the file again") from None


FORMAT = FeatureFormat(
    name="gqa_hdf5",
    help="GQA's object features: gqa_objects_info.json with its .h5 files",
    extractor="bottom-up-attention",
    detect=_detect,
    files=_files,
    entries=_entries,
    reader=_reader,
)
