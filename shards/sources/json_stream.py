"""JSON files of any size, read one item at a time.

The standard library parses each item; here is only the walk from one to the next. Memory: the
largest item, and a block. (ijson's memory grows with the square of the nesting, so that a file of
100,000 brackets takes tens of gigabytes.)
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from shards.errors import DataError

_BLOCK = 1 << 20  # bytes read at a time, and more while an item is larger
_HEAD = 1 << 16  # bytes that tell what a file is
_TOKEN = 16  # characters of the longest token that is no string: -Infinity, an escape, 1e+
_SPACE = " \t\r\n"


def list_items(path: str | Path, what: str, key: str | None = None) -> Iterator[tuple[int, Any]]:
    """The items of a file that is a list, or of the list that an object has under `key`, with their
    numbers. DataError naming `what` it is and the file where it is no JSON or has no such list."""
    with _opened(path, what) as f:
        walk = _Walk(f, f"the {what} {path}")
        if key is None:
            walk.begin("[", "a list")
            yield from walk.items()
            walk.end()
            return
        found = False
        walk.begin("{", "an object")
        for name in walk.names():
            if name == key and walk.peek() == "[":
                walk.take()
                found = True
                yield from walk.items()
            else:
                walk.value()
        walk.end()
        if not found:
            raise DataError(f"the {what} {path} has no list {key!r}")


def pairs(path: str | Path, what: str) -> Iterator[tuple[str, Any]]:
    """Keys and values of a file that is one object; DataError as `list_items`."""
    with _opened(path, what) as f:
        walk = _Walk(f, f"the {what} {path}")
        walk.begin("{", "an object")
        for name in walk.names():
            yield name, walk.value()
        walk.end()


def head(path: str | Path) -> bytes:
    """The first bytes of a file, to see what it is. OSError where it cannot be read."""
    with open(path, "rb") as f:
        return f.read(_HEAD)


def _opened(path: str | Path, what: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error.strerror}") from None


class _Walk:
    """A place in a JSON text."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._whole = "", 0, False
        self._before = 0  # characters that were dropped from the text

    def begin(self, first: str, kind: str) -> None:
        """Step into the file's list or object."""
        found = self.peek()
        if found != first and found:
            self.value()
            raise DataError(f"{self._name} is not {kind}")
        self.take()

    def end(self) -> None:
        if self.peek():
            raise self._bad("there is more after its end")

    def items(self) -> Iterator[tuple[int, Any]]:
        """The items of a list that was stepped into, to its end."""
        number = 0
        while self.peek() != "]":
            if number:
                self._separator()
            yield number, self.value()
            number += 1
        self.take()

    def names(self) -> Iterator[str]:
        """The keys of an object that was stepped into; the value of each is to be taken."""
        first = True
        while self.peek() != "}":
            if not first:
                self._separator()
            first = False
            if self.peek() != '"':
                raise self._bad("a key is expected")
            name = self.value()
            if self.take() != ":":
                raise self._bad("a colon is expected")
            yield name
        self.take()

    def value(self) -> Any:
        """The value that begins here."""
        if not self.peek():
            raise self._bad("it ends too early")
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except RecursionError:
                raise self._bad("it is nested too deeply") from None
            except ValueError as error:
                # Its end may be in the next block; a fault before it is one whatever follows.
                if self._cut(error) and self._fill():
                    continue
                place = getattr(error, "pos", self._at)
                raise self._bad(getattr(error, "msg", str(error)), place) from None
            tail = self._text[end : end + 3]  # of a number, which may go on: `1` of `1e+9`
            if len(tail) < 3 and not tail.strip("+-.eE0123456789") and self._fill():
                continue
            self._at = end
            return value

    def _cut(self, error: ValueError) -> bool:
        """Whether a value may be wrong only because the text that was read ends in it."""
        if not isinstance(error, json.JSONDecodeError):  # a number of too many digits
            return False
        return error.msg.startswith("Unterminated") or error.pos + _TOKEN >= len(self._text)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._fill():
                return ""

    def take(self) -> str:
        found = self.peek()
        if not found:
            raise self._bad("it ends too early")
        self._at += 1
        return found

    def _separator(self) -> None:
        if self.take() != ",":
            raise self._bad("a comma is expected", self._at - 1)
        if self.peek() in ("]", "}"):
            raise self._bad("a value is expected after a comma")

    def _fill(self) -> bool:
        """Read on, dropping what is done; False where nothing is left."""
        if self._whole:
            return False
        rest = self._text[self._at :]
        self._before += self._at
        try:
            data = self._file.read(max(_BLOCK, len(rest)))
            self._whole = not data
            self._text, self._at = rest + self._decode(data, not data), 0
        except OSError as error:
            raise DataError(f"cannot read {self._name}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise self._bad(f"it is not UTF-8 text ({error.reason})") from None
        return bool(data)

    def _bad(self, problem: str, at: int | None = None) -> DataError:
        place = self._before + (self._at if at is None else at)
        return DataError(
            f"{self._name} is not JSON: {problem} at character {place:,}; copy or make it again"
        )
