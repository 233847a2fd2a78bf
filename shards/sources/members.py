"""Values in members of a WebDataset sample, each at a place.

A place is the suffix of a member, as webdataset has it (`000.features.npy` has the suffix
`features.npy`), and after a colon the name of an array in a .npz or of a key in a .json:

    .npy .npz     arrays, never pickled ones
    .f16 .f32     raw little-endian floats
    .u8           features as our own tars have them in uint8 (shards/format/features.py)
    .json         any value
    .txt          a list of lines
    labels.bin    labels as our own tars have them: `labels.bin:object_id` and so on
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.members import LABELS
from shards.sources.checks import PartError

LABEL_COLUMNS = tuple(column.name for column in LABELS.columns)
_LARGEST = 1 << 30  # bytes that a .npz may unpack to


def value_at(place: str, members: Mapping[str, bytes]) -> Any:
    """The value at a place; None where the members have none. PartError for unreadable members."""
    suffix, _, name = place.partition(":")
    payload = members.get(suffix)
    if payload is None:
        return None
    try:
        return _READERS[_kind(suffix)](payload, name)
    except Exception as error:  # parsers of strangers' data may raise anything
        raise PartError(suffix, f"it cannot be read ({error})") from None


def lowered(place: str) -> str:
    """A place with its suffix in lower case, as those of members are read."""
    suffix, colon, name = place.partition(":")
    return f"{suffix.lower()}{colon}{name}"


def check_place(place: str) -> None:
    """DataError for a place at which nothing can be read."""
    suffix, _, name = place.partition(":")
    kind = _kind(suffix)
    if kind not in _READERS:
        raise DataError(f"{place!r} is no place: the members that are read end in {_ENDS}")
    if name and kind not in ("json", "npz", "labels.bin"):
        raise DataError(f"{place!r} is no place: only .npz and .json have names after a colon")
    if kind == "labels.bin" and name not in LABEL_COLUMNS:
        raise DataError(f"{place!r} is no place: labels.bin has {', '.join(LABEL_COLUMNS)}")


def _kind(suffix: str) -> str:
    return suffix if suffix == "labels.bin" else suffix.rpartition(".")[2]


@functools.lru_cache(maxsize=1)
def _document(payload: bytes) -> Any:
    """Parsed once for all the parts that are in it."""
    try:
        return json.loads(payload)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _json(payload: bytes, name: str) -> Any:
    document = _document(payload)
    if not name:
        return document
    return document.get(name) if isinstance(document, dict) else None


def _npy(payload: bytes, name: str) -> NDArray:
    array: NDArray = np.load(io.BytesIO(payload), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it is no .npy")
    return array


def _npz(payload: bytes, name: str) -> NDArray | None:
    with zipfile.ZipFile(io.BytesIO(payload)) as packed:
        if sum(i.file_size for i in packed.infolist()) > _LARGEST:
            raise ValueError(f"it unpacks to more than {_LARGEST:,} bytes")
        names = packed.namelist()
        if not name and len(names) != 1:
            raise ValueError(f"it has {len(names)} arrays: name one after a colon")
        member = f"{name}.npy" if name else names[0]
        return _npy(packed.read(member), "") if member in names else None


def _labels(payload: bytes, name: str) -> NDArray:
    objects = len(payload) // sum(np.dtype(c.type).itemsize for c in LABELS.columns)
    column: NDArray = getattr(LABELS.value(payload, objects), name)
    return column


_READERS: dict[str, Callable[[bytes, str], Any]] = {
    "npy": _npy,
    "npz": _npz,
    "f16": lambda payload, name: np.frombuffer(payload, "<f2"),
    "f32": lambda payload, name: np.frombuffer(payload, "<f4"),
    "u8": lambda payload, name: np.frombuffer(payload, np.uint8),
    "json": _json,
    "txt": lambda payload, name: payload.decode().splitlines(),
    "labels.bin": _labels,
}
"""(content of a member, name after the colon) → the value; None where it has no such name."""

_ENDS = ", ".join(_READERS)
