"""Named arrays in a safetensors file, memory-mapped without a copy."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, explained, node_error

# Names of the safetensors format for the types that we write; the bytes are little endian.
_TYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
_LONGEST_HEADER = 1 << 20  # bytes
_NAMES = {np.dtype(code): name for name, code in _TYPES.items()}


Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type (as "<i4") and shape of each array of a file, by name."""


def save_arrays(path: str | Path, arrays: Mapping[str, NDArray]) -> None:
    """Write arrays as a safetensors file: the same arrays give the same bytes.

    The library's own writer copies every array and makes files that others may not read (0600).
    """
    layout = {n: (a.dtype.newbyteorder("<").str, a.shape) for n, a in arrays.items()}
    with open(path, "wb") as f:
        f.write(_head(layout)[0])
        for name in _in_order(layout):
            array = arrays[name]
            array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tofile(f)


def create_arrays(path: str | Path, layout: Layout) -> dict[str, NDArray]:
    """Make a safetensors file of arrays of zeros, mapped to be written to."""
    head, places = _head(layout)
    size = max((end for _, end in places.values()), default=0)
    with open(path, "wb") as f:
        f.write(head)
        # Not a hole: a full disk is an error here, and not a signal at the first write to a page.
        if size:
            os.posix_fallocate(f.fileno(), len(head), size)
    mapped = np.memmap(path, dtype=np.uint8, mode="r+")
    return {
        name: mapped[len(head) + first : len(head) + end].view(kind).reshape(shape)
        for name, (kind, shape) in layout.items()
        for first, end in [places[name]]
    }


def _in_order(layout: Layout) -> list[str]:
    """Widest types first, so that every array is aligned."""
    return sorted(layout, key=lambda name: (-np.dtype(layout[name][0]).itemsize, name))


def _head(layout: Layout) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes before the arrays, and where each of them begins and ends after these."""
    header, places, at = {}, {}, 0
    for name in _in_order(layout):
        kind, shape = layout[name]
        end = at + math.prod(shape) * np.dtype(kind).itemsize
        header[name] = {
            "dtype": _NAMES[np.dtype(kind)],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        places[name] = at, end
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def map_arrays(path: str | Path, locked: bool = False) -> dict[str, NDArray]:
    """Read-only views into the memory-mapped file; DataError naming it when it is not whole.
    locked: it has a shared lock as long as it is mapped.

    The library's own reader copies every array, which tables of gigabytes cannot afford.
    """
    try:
        with open(path, "rb") as f:
            if locked:
                fcntl.flock(f, fcntl.LOCK_SH)
            # The map has another descriptor of this open file, which keeps the lock.
            data = np.memmap(f, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        raise node_error(path, error) from None
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return parse_arrays(data, str(path))


def parse_arrays(data: NDArray[np.uint8], where: str) -> dict[str, NDArray]:
    """Views into the bytes of a safetensors file; DataError naming `where` when it is not whole."""
    try:
        begin, entries = _header(data)
        arrays, at = {}, 0
        for name, kind, shape, first, end in entries:
            if first != at:
                raise ValueError(f"{name} begins at {first}, not at {at}, where the last one ends")
            count = math.prod(shape)
            if end - first != count * np.dtype(kind).itemsize or end > len(data) - begin:
                raise ValueError(f"{name} does not fit: {count} of {kind} at {first} to {end}")
            arrays[name] = np.frombuffer(data, kind, count, begin + first).reshape(shape)
            at = end
        if at != len(data) - begin:
            raise ValueError(f"{len(data) - begin} bytes of data where the arrays have {at}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is not a whole table: {error}; build it again") from None
    return arrays


def array_sizes(path: str | Path) -> dict[str, int]:
    """Elements of each array, by the file's header alone."""
    with explained(path), open(path, "rb") as f:
        head = f.read(8)
        head += f.read(min(int.from_bytes(head, "little"), _LONGEST_HEADER))
    try:
        _, entries = _header(np.frombuffer(head, np.uint8))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a whole table: {error}; build it again") from None
    return {name: math.prod(shape) for name, _, shape, _, _ in entries}


def _header(data: NDArray[np.uint8]) -> tuple[int, list[tuple[str, str, list[int], int, int]]]:
    """Where the arrays begin, and of each the name, type, shape, first byte and end, in order.
    Raises ValueError or the like where that cannot be read."""
    size = int(data[:8].view("<u8")[0])
    if not 0 < size <= min(_LONGEST_HEADER, len(data) - 8):
        raise ValueError(f"a header of {size} bytes")
    header = json.loads(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        shape, (first, end) = entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, first, end)):
            raise ValueError(f"{name} has a size that is none")
        entries.append((name, _TYPES[entry["dtype"]], shape, first, end))
    return 8 + size, sorted(entries, key=lambda e: (e[3], e[4]))
