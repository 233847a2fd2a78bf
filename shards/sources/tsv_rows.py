"""Rows of large TSVs by where they begin: VinVL's .lineidx says it, else the whole file is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shards.errors import DataError

LONGEST_ROW = 64 << 20  # bytes; 100 boxes have 1.1 MB
HEAD = 4096  # bytes of a row that are listed with it


@dataclass(frozen=True)
class Row:
    at: int
    head: bytes
    """Its first bytes."""

    def id(self) -> bytes:
        return self.head.split(b"\t", 1)[0].rstrip(b"\r\n")


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") as f:
            yield f
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def rows_of(path: str) -> Iterator[Row]:
    """The rows of a TSV: found by its .lineidx, else by reading all of it."""
    index = Path(path).with_suffix(".lineidx")
    with opened(path) as f:
        if index.is_file():
            yield from _listed_rows(f, path, index)
            return
        at = 0
        while line := f.readline(LONGEST_ROW):
            if len(line) == LONGEST_ROW:
                raise DataError(f"{path}: the row at byte {at:,} does not end: not such a TSV")
            yield Row(at, line[:HEAD])
            at += len(line)


def _listed_rows(f: IO[bytes], path: str, index: Path) -> Iterator[Row]:
    wrong = DataError(
        f"{index} does not belong to {path}: remove it, and rows are found without it, or copy both"
    )
    at, end, size = -1, 0, os.fstat(f.fileno()).st_size
    with opened(str(index)) as lines:
        for line in lines:
            if not line.strip().isdigit() or len(line) > 20 or int(line) <= at:
                raise wrong
            at = int(line)
            f.seek(max(at - 1, 0))
            head = f.read(HEAD + (at > 0))
            # A file that is cut off ends before rows that are listed.
            if at >= size:
                raise DataError(f"{path} is cut off before byte {at:,}; copy it again")
            if at and head[:1] != b"\n":
                raise wrong
            yield Row(at, head[1:] if at else head)
    if at >= 0:
        f.seek(at)
        end = at + len(f.readline(LONGEST_ROW))
    if end != size:
        raise wrong
