"""Named arrays in a safetensors file, memory-mapped without a copy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError

# Names of the safetensors format for the types that we write; the bytes are little endian.
_TYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
_NAMES = {np.dtype(code): name for name, code in _TYPES.items()}


def save_arrays(path: str | Path, arrays: Mapping[str, NDArray]) -> None:
    """Write arrays as a safetensors file: the same arrays give the same bytes.

    The library's own writer copies every array and makes files that others may not read (0600).
    """
    # Widest types first, so that every array is aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, at = {}, 0
    for name in order:
        array = arrays[name]
        kind = _NAMES[array.dtype.newbyteorder("<")]
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = arrays[name]
            array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tofile(f)


def map_arrays(path: str | Path) -> dict[str, NDArray]:
    """Read-only views into the memory-mapped file; DataError naming it when it is not whole.

    The library's own reader copies every array, which tables of gigabytes cannot afford.
    """
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        header_size = int(mapped[:8].view("<u8")[0])
        header = json.loads(mapped[8 : 8 + header_size].tobytes())
        header.pop("__metadata__", None)
        data = mapped[8 + header_size :]
        arrays, covered = {}, 0
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = np.dtype(_TYPES[entry["dtype"]])
            if not 0 <= begin <= end <= len(data):
                raise ValueError(f"{name} lies outside of the file")
            view = np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, begin)
            arrays[name] = view.reshape(entry["shape"])
            covered += end - begin
        if covered != len(data):
            raise ValueError(f"{len(data)} bytes of data where the arrays have {covered}")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise DataError(f"{path} is not a whole table: {error}; fetch or build it again") from None
    return arrays
