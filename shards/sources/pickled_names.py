"""What the names in pickles of plain data mean: the few that numpy arrays are pickled with.

Part of shards/sources/restricted_pickle.py; nothing here imports or calls what a pickle says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}
Copy = Callable[[int], None]
"""Counts bytes that a pickle can ask for again and again, and ends it where they are too many."""


class PickleError(ValueError):
    """It is damaged, or has what is no plain data."""


@dataclass(frozen=True)
class Name:
    """Something that the pickle names; it does nothing by itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Type:
    """A numpy.dtype under way."""

    code: str
    order: str = "|"

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order.replace("|", "=") + self.code)


@dataclass
class Array:
    """A numpy.ndarray under way: it has no value before its state is set."""

    value: NDArray | Box | None = None


@dataclass(frozen=True)
class Box:
    """An object array without dimensions, and what is in it."""

    item: Any


_NUMPY = ("numpy.core", "numpy._core")
ADMITTED = {
    Name("numpy", "ndarray"),
    Name("numpy", "dtype"),
    Name("_codecs", "encode"),
    *(Name(f"{core}.multiarray", name) for core in _NUMPY for name in ("_reconstruct", "scalar")),
    *(Name(f"{core}.numeric", "_frombuffer") for core in _NUMPY),
    *(Name(module, name) for module in ("builtins", "__builtin__") for name in ("set", "bytes")),
}


def _type(code: Any) -> Type:
    """numpy.dtype(code, …) for numbers and text."""
    text = code.decode("ascii", "replace") if isinstance(code, bytes) else code
    if isinstance(text, str):
        kind, digits = text[:1], text[1:]
        size = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 9 else 0
        if size in _SIZES.get(kind, ()) or (kind in ("U", "S") and digits.isdigit()):
            return Type(text)
        if kind == "O":
            return Type("O")
    shown = repr(text[:40]) if isinstance(text, str) else f"a {type(code).__name__}"
    raise PickleError(f"the pickle has an array of type {shown}, which is no plain number")


def data_of(value: Any) -> Any:
    """A value of a result: no name or type."""
    if isinstance(value, Name | Type):
        what = value if isinstance(value, Name) else "a numpy.dtype"
        raise PickleError(f"the pickle has {what} in its data, which is no plain data")
    return value


def key_of(value: Any) -> Any:
    # Hashing a tuple of tuples of … can take for ever.
    if not isinstance(value, str | bytes | int | float | None):
        raise PickleError(f"the pickle has a {type(value).__name__} as a key: only text or numbers")
    return value


def _call_dtype(copy: Copy, given: tuple[Any, ...]) -> Type:
    return _type(given[0])


def _call_reconstruct(copy: Copy, given: tuple[Any, ...]) -> Array:
    if given[0] != Name("numpy", "ndarray"):
        raise PickleError("the pickle has an array of a class of its own: numpy's alone is read")
    return Array()


def _call_scalar(copy: Copy, given: tuple[Any, ...]) -> Any:
    kind, raw = given
    return filled(copy, kind, (), raw)[()]


def _call_frombuffer(copy: Copy, given: tuple[Any, ...]) -> NDArray:
    raw, kind, shape, order = given[:4]
    if len(given) > 4 and given[4] is not None:
        raise PickleError("the pickle has an array with its axes in another order")
    return filled(copy, kind, shape, raw, fortran=order == "F")


def _call_encode(copy: Copy, given: tuple[Any, ...]) -> bytes:
    text, codec = given
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise PickleError("the pickle encodes what is no latin-1 text")
    copy(len(text))
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise PickleError("the pickle encodes what is no latin-1 text") from None


def _call_bytes(copy: Copy, given: tuple[Any, ...]) -> bytes:
    if given:
        raise PickleError("the pickle makes bytes of what it has: only empty ones are made so")
    return b""


def _call_set(copy: Copy, given: tuple[Any, ...]) -> set[Any]:
    values = given[0] if given else []
    if not isinstance(values, list):
        raise PickleError("the pickle makes a set of what is no list")
    copy(64 * len(values))
    return {key_of(value) for value in values}


CALLS: dict[str, Callable[[Copy, tuple[Any, ...]], Any]] = {
    "dtype": _call_dtype,
    "_reconstruct": _call_reconstruct,
    "scalar": _call_scalar,
    "_frombuffer": _call_frombuffer,
    "encode": _call_encode,
    "bytes": _call_bytes,
    "set": _call_set,
}


def set_state(target: Any, state: Any, boxed: bool, copy: Copy) -> None:
    """Fill a dtype or an array with the state that the pickle has of it."""
    if not isinstance(state, tuple):
        raise PickleError("the pickle sets the state of what is no array")
    if isinstance(target, Type):
        # (version, byte order, subdtype, names, fields, size, alignment, flags, …)
        if len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise PickleError(
                "the pickle has an array of a composed type: only plain ones are read"
            )
        target.order = state[1]
    elif isinstance(target, Array) and len(state) == 5:
        _version, shape, kind, fortran, raw = state
        if isinstance(kind, Type) and kind.code == "O":
            if not (boxed and shape == () and isinstance(raw, list) and len(raw) == 1):
                raise PickleError("the pickle has an array of objects: only numbers are read")
            target.value = Box(data_of(raw[0]))
        else:
            target.value = filled(copy, kind, shape, raw, bool(fortran))
    else:
        raise PickleError("the pickle sets the state of what is no array")


def filled(copy: Copy, kind: Any, shape: Any, raw: Any, fortran: bool = False) -> NDArray:
    """An array of the bytes that the pickle has; nothing is copied."""
    if isinstance(raw, str):  # Python 2's bytes
        copy(len(raw))
        try:
            raw = raw.encode("latin-1")
        except UnicodeEncodeError:
            raise PickleError("the pickle has an array of text where bytes are due") from None
    if not isinstance(kind, Type) or not isinstance(raw, bytes | bytearray):
        raise PickleError("the pickle has an array of objects: only numbers are read")
    shape = (shape,) if isinstance(shape, int) else shape
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise PickleError("the pickle has an array without a shape")
    if len(shape) > 32:
        raise PickleError(f"the pickle has an array of {len(shape)} dimensions")
    if kind.code == "O":
        raise PickleError("the pickle has an array of objects: only numbers are read")
    dtype, due = kind.dtype(), 1
    for n in shape:
        due *= n
    if due * dtype.itemsize != len(raw) or not dtype.itemsize:
        raise PickleError(
            f"the pickle has an array of shape {shape!s:.80} and type {dtype} in {len(raw):,} bytes"
        )
    if (
        dtype.kind == "U"
        and raw
        and np.frombuffer(raw, f"{dtype.byteorder}u4").max() > sys.maxunicode
    ):
        raise PickleError("the pickle has text of no Unicode: it is damaged")
    array = np.frombuffer(raw, dtype) if raw else np.empty(0, dtype)
    return array.reshape(shape, order="F" if fortran else "C")
