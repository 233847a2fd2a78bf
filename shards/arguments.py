"""The types of command-line arguments. A value of no sense is an error that names its option."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from shards.store.places import expanded

# Whole numbers go into 32 bits.
_MOST = 2**31 - 1
# Bytes: far more than there are, and within 64 bits.
_MOST_BYTES = 2**62


def whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """The type of a whole number, `least` to `most`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # as of too many digits
            value = least - 1
        if not least <= value <= most:
            span = f"from {least}" if most == _MOST else f"from {least} to {most}"
            raise ArgumentTypeError(f"{text!r:.40} is no whole number {span}")
        return value

    return number


def size(unit: int) -> Callable[[str], int]:
    """The type of a size above 0, given in units of so many bytes; its value is in bytes."""

    def count(text: str) -> int:
        try:
            value = float(text) * unit
        except ValueError:
            value = math.nan
        if not 1 <= value <= _MOST_BYTES:
            raise ArgumentTypeError(f"{text!r:.40} is no size: give a number above 0")
        return int(value)

    return count


def given_name(text: str) -> str:
    """The type of an argument that names something."""
    if not text.strip():
        raise ArgumentTypeError("it is empty: give a name, or leave the option out")
    return text


def given_place(text: str) -> str:
    """The type of a folder or URL. A shell does not expand the ~ of `--out=~/x`."""
    if not text.strip() or "\0" in text:
        raise ArgumentTypeError(f"{text!r} is no path or URL")
    try:
        return expanded(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def given_path(text: str) -> Path:
    """The type of a local file or folder."""
    return Path(given_place(text))
