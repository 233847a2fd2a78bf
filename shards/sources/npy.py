"""Arrays in .npy and .npz, from bytes: declared sizes are checked first, and nothing is unpickled.

numpy.load makes room for whatever shape a header declares, and a .npz may unpack to far more than
it has; here an array is a view of bytes that are there.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

_LARGEST = 1 << 30  # bytes that one file may unpack to


def read_npy(data: bytes) -> NDArray | bytes:
    """The array of a .npy; of one of objects, the pickle that it has. ValueError where it is
    damaged."""
    f = io.BytesIO(data)
    try:
        version = npy_format.read_magic(f)
        headers = {
            (1, 0): npy_format.read_array_header_1_0,
            (2, 0): npy_format.read_array_header_2_0,
        }
        shape, fortran, dtype = headers[version](f)
    except Exception as error:  # a header is Python's text, and damage may be anything
        raise ValueError(f"it is damaged, or no .npy ({error!s:.80})") from None
    rest = data[f.tell() :]
    if dtype.hasobject:
        return rest
    due = dtype.itemsize
    for n in shape:
        due *= n
    if due != len(rest):
        raise ValueError(f"its array of shape {shape} has {len(rest):,} bytes instead of {due:,}")
    try:
        return np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")
    except OverflowError:
        raise ValueError(f"its array has a shape {shape}") from None


def read_npz(data: bytes, wanted: Callable[[str], bool]) -> dict[str, NDArray]:
    """The arrays of a .npz with wanted names, but those of objects. ValueError where it is damaged
    or unpacks to more than a gigabyte."""
    out = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            members = {m.filename.removesuffix(".npy"): m for m in packed.infolist()}
            chosen = {name: m for name, m in members.items() if wanted(name)}
            if sum(m.file_size for m in chosen.values()) > _LARGEST:
                raise ValueError(f"it unpacks to more than {_LARGEST:,} bytes")
            for name, member in chosen.items():
                with packed.open(member) as f:
                    content = f.read(member.file_size + 1)
                array = read_npy(content)
                if isinstance(array, np.ndarray):
                    out[name] = array
    except (
        zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError,
    ) as error:  # fmt: skip
        raise ValueError(f"it is damaged, or no .npz ({error})") from None
    return out
