"""LMDB as VOLTA, ViLBERT and MMF write it.

`keys` has a pickled list of all keys, and each key a pickled dict of an image: ids, sizes and
counts as text or numbers, arrays as base64 (VOLTA: a row of the TSV) or numpy's (ViLBERT, MMF). The
names of the parts are in shards/sources/detections.py. Pickles are read by
shards/sources/restricted_pickle.py, which runs nothing.

An image's id is its key: VOLTA and MMF have bare numbers there for COCO (`--numbers coco`). In
memory while it is listed: all keys, about 100 bytes an image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from shards.errors import DataError
from shards.sources import lmdb_file, restricted_pickle
from shards.sources.detections import LABELS_SETTING, find, image_name, regions, wants_labels
from shards.sources.regions import Entry, FeatureFormat, Options, Reader, Regions


def _detect(place: str) -> bool:
    return lmdb_file.has_key(place, b"keys")


def _entries(path: str, options: Options) -> Iterator[Entry]:
    wants_labels(options)
    with lmdb_file.opened(path) as database:
        for number, key in enumerate(_keys(path, database)):
            try:
                name = image_name(key)
            except ValueError as error:
                yield Entry("", "", f"key {number}", problem=str(error))
                continue
            yield Entry(name, name, f"key {name}")


def _keys(path: str, database: lmdb_file.Lmdb) -> list[Any]:
    packed = database.get(b"keys")
    if packed is None:
        raise DataError(f"{path} has no entry 'keys': it is no LMDB of VOLTA, ViLBERT or MMF")
    try:
        keys = restricted_pickle.loads(packed)
    except ValueError as error:
        raise DataError(f"{path}, entry 'keys': {error}") from None
    if not isinstance(keys, list):
        raise DataError(f"{path}, entry 'keys': it is no list of keys")
    return keys


@contextlib.contextmanager
def _reader(path: str, options: Options) -> Iterator[Reader]:
    wants_labels(options)
    with lmdb_file.opened(path) as database:

        def read(entry: Entry) -> Regions:
            packed = database.get(entry.position.encode())
            if packed is None:
                raise ValueError("it is in the list of keys, but not there")
            return _decode(entry.position, restricted_pickle.loads(packed), options)

        yield read


def _decode(key: str, parts: Any, options: Options) -> Regions:
    if not isinstance(parts, dict):
        raise ValueError("it is no dict of an image")
    if found := find(parts, "image"):
        name = image_name(found[1])
        if not name.endswith(key):  # VOLTA: 318556 for COCO_train2014_000000318556
            raise ValueError(f"under this key is image {name!r:.120}")
    return regions(key, parts, options)


FORMAT = FeatureFormat(
    name="volta_lmdb",
    help="LMDB of VOLTA, ViLBERT or MMF: pickled dicts, read without running anything",
    extractor="bottom-up-attention",
    detect=_detect,
    files=lmdb_file.files,
    entries=_entries,
    reader=_reader,
    settings=LABELS_SETTING,
)
