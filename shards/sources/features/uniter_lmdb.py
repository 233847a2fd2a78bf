"""LMDB as UNITER writes it (scripts/convert_imgdir.py there).

`__keys__` has a JSON list of all names, and each name a map of arrays, float16 mostly: packed with
msgpack and msgpack-numpy, or, in folders that end in `_compressed`, as .npz.

    features      (n, 2048)
    norm_bb       (n, 6): x1 y1 x2 y2 over width and height, and width and height of the box
    conf          (n): how sure the detector was of the box
    soft_labels   (n, 1601): probabilities of classes, the background first

A database in `feat_th0.2_max100_min10` has beside its folder `nbb_th0.2_max100_min10.json` with the
number of boxes of each image; further rows, as `all` may have them, are left out by it.

Sizes of images are nowhere in it: the user gives them (shards/sources/image_sizes.py). Boxes are
fractions, so that a size changes no box. `coco_train2014_000000318556.npz` is the image
COCO_train2014_000000318556, and `vg_2370799.npz` is vg/2370799. In memory while it is listed: all
names, counts and sizes, about 500 bytes an image.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.sources import lmdb_file
from shards.sources.detections import LABELS_SETTING, image_name, regions, wants_labels
from shards.sources.image_sizes import SETTINGS, given_sizes, missing_size
from shards.sources.json_stream import pairs
from shards.sources.libraries import library
from shards.sources.npy import read_npz
from shards.sources.regions import Entry, FeatureFormat, Options, Reader, Regions

_PARTS = frozenset({"features", "norm_bb", "conf", "soft_labels"})
_COCO = re.compile(r"coco_((?:train|val|test)20\d\d_\d{12})")
_VG = re.compile(r"vg_(\d{1,18})")


def _detect(place: str) -> bool:
    return lmdb_file.has_key(place, b"__keys__")


def _entries(path: str, options: Options) -> Iterator[Entry]:
    wants_labels(options)
    sizes, counts = given_sizes(options.settings), _counts(Path(path).parent)
    if not sizes:
        raise DataError(f"{path}: {missing_size(options.settings)}")
    with lmdb_file.opened(path) as database:
        for number, key in enumerate(_keys(path, database)):
            try:
                key = image_name(key)
            except ValueError as error:
                yield Entry("", "", f"key {number}", problem=str(error))
                continue
            image, count, size = _image(key), counts.get(key, 0), sizes.of(_image(key))
            if size is None:
                yield Entry(image, "", f"key {key}", problem=missing_size(options.settings))
                continue
            # The reader needs neither sizes nor counts again.
            position = json.dumps([key, *size, count])
            yield Entry(image, position, f"key {key}", count)


def _keys(path: str, database: lmdb_file.Lmdb) -> list[Any]:
    packed = database.get(b"__keys__")
    if packed is None:
        raise DataError(f"{path} has no entry '__keys__': it is no LMDB of UNITER")
    try:
        keys = json.loads(packed)
    except (ValueError, RecursionError):
        keys = None
    if not isinstance(keys, list):
        raise DataError(f"{path}, entry '__keys__': it is no list of names in JSON; copy it again")
    return keys


def _counts(folder: Path) -> dict[str, int]:
    """The number of boxes by name; empty where there is no such file."""
    name = folder.name.removesuffix("_compressed")
    path = folder.parent / f"nbb_{name.removeprefix('feat_')}.json"
    if not name.startswith("feat_") or not path.is_file():
        return {}
    counts = {}
    for image, count in pairs(path, "file of numbers of boxes"):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise DataError(f"{path}: {image:.60} has {count!r:.40} boxes; copy it again")
        counts[image] = count
    return counts


def _image(key: str) -> str:
    name = key.removesuffix(".npz")
    if match := _COCO.fullmatch(name):
        return f"COCO_{match[1]}"
    return f"vg/{int(match[1])}" if (match := _VG.fullmatch(name)) else name


@contextlib.contextmanager
def _reader(path: str, options: Options) -> Iterator[Reader]:
    wants_labels(options)
    with lmdb_file.opened(path) as database:

        def read(entry: Entry) -> Regions:
            key, width, height, count = json.loads(entry.position)
            packed = database.get(key.encode())
            if packed is None:
                raise ValueError("it is in the list of keys, but not there")
            parts = _unpacked(packed)
            if count:
                parts["num_boxes"] = count
            return regions(_image(key), parts, options, (width, height))

        yield read


def _unpacked(packed: bytes) -> dict[str, Any]:
    if packed.startswith(b"PK"):
        return dict(read_npz(packed, _PARTS.__contains__))
    msgpack = library("msgpack", "an LMDB of UNITER")
    try:
        found = msgpack.unpackb(packed, raw=False, strict_map_key=False)
    except Exception as error:  # it raises many kinds
        raise ValueError(f"it is damaged, or no msgpack ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("it is no map of arrays")
    return {str(k): _array(str(k), v) for k, v in found.items() if k in _PARTS}


def _array(name: str, packed: Any) -> NDArray:
    """An array as msgpack-numpy packs it, {nd, type, kind, shape, data}; pickles are refused."""
    parts = packed if isinstance(packed, dict) else {}
    parts = {
        k.decode("ascii", "replace") if isinstance(k, bytes) else k: v for k, v in parts.items()
    }
    kind, shape, data = parts.get("type"), parts.get("shape"), parts.get("data")
    plain = parts.get("nd") is True and parts.get("kind") in ("", b"", None)
    if not plain or not isinstance(kind, str | bytes) or not isinstance(data, bytes):
        raise ValueError(f"its {name} is no array of numbers")
    text = kind if isinstance(kind, str) else kind.decode("ascii", "replace")
    if not re.fullmatch(r"[<|=][fiu][1248]", text):
        raise ValueError(f"its {name} is an array of type {text!r:.40}, not of numbers")
    try:
        return np.frombuffer(data, text).reshape(shape)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"its {name} of shape {shape!r:.60} has {len(data):,} bytes") from None


FORMAT = FeatureFormat(
    name="uniter_lmdb",
    help="LMDB of UNITER: msgpack or .npz; sizes of images are to be given",
    extractor="bottom-up-attention",
    detect=_detect,
    files=lmdb_file.files,
    entries=_entries,
    reader=_reader,
    settings={**SETTINGS, **LABELS_SETTING},
)
