"""Rows of Parquet files and of Arrow streams, a few at a time, and cells as numpy arrays."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from shards.errors import DataError
from shards.sources.libraries import library

_ROWS = 16  # read at a time; a row of 100 boxes has 0.8 MB
_WHAT = "Parquet and Arrow files"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


@dataclass(frozen=True)
class Table:
    """An open file."""

    path: str
    names: list[str]
    """Of its columns."""
    groups: int
    """Parts that can be read without those before them."""
    batches: Callable[[int, list[str]], Iterator[Any]]
    """The rows of a group, with these columns, as small RecordBatches."""


@contextlib.contextmanager
def opened(path: str) -> Iterator[Table]:
    """A Parquet file, or an Arrow stream (.arrow). DataError where it cannot be read."""
    with ExitStack() as stack:
        with named(path):
            table = (_arrow if path.endswith(".arrow") else _parquet)(path, stack)
        yield table


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """Turns pyarrow's errors into one that names the file."""
    pa = library("pyarrow", _WHAT)
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot read {path}: {problem:.200}; copy it again") from None


def _parquet(path: str, stack: ExitStack) -> Table:
    parquet = library("pyarrow.parquet", _WHAT)
    opened_file = stack.enter_context(library("pyarrow", _WHAT).OSFile(path))
    file = parquet.ParquetFile(opened_file, pre_buffer=False)

    def batches(group: int, columns: list[str]) -> Iterator[Any]:
        with named(path):
            yield from file.iter_batches(_ROWS, row_groups=[group], columns=columns)

    return Table(path, file.schema_arrow.names, file.num_row_groups, batches)


def _arrow(path: str, stack: ExitStack) -> Table:
    pa = library("pyarrow", _WHAT)
    with open(path, "rb") as f:
        f.seek(-min(len(_END), os.fstat(f.fileno()).st_size), os.SEEK_END)
        if f.read() != _END:
            raise DataError(f"{path} is cut off, or no Arrow stream; copy it again")
    mapped = stack.enter_context(pa.memory_map(path))

    def stream() -> Any:
        mapped.seek(0)
        return pa.ipc.open_stream(mapped)

    def batches(_group: int, columns: list[str]) -> Iterator[Any]:
        with named(path):
            for batch in stream():
                chosen = batch.select(columns)
                for at in range(0, batch.num_rows, _ROWS):
                    part = chosen.slice(at, _ROWS)
                    part.validate(full=True)  # offsets of what is mapped are anything
                    yield part

    return Table(path, stream().schema.names, 1, batches)


def seeker(table: Table, columns: list[str]) -> Callable[[int, int], tuple[Any, int]]:
    """A function (group, row in it) → a batch and the row in it. It reads on from where it is, and
    for earlier rows from the beginning of the group. ValueError where there is no such row."""
    at, begin = -1, 0  # the group, and its row at which the batch begins
    batches: Iterator[Any] = iter(())
    batch: Any = None

    def seek(group: int, row: int) -> tuple[Any, int]:
        nonlocal at, begin, batches, batch
        if group != at or row < begin:
            at, begin, batches, batch = group, 0, table.batches(group, columns), None
        while batch is None or row >= begin + batch.num_rows:
            begin += batch.num_rows if batch is not None else 0
            batch = next(batches, None)
            if batch is None:
                at = -1
                raise ValueError("it is not there any more: leave files as they are during a build")
        return batch, row - begin

    return seek


def cell(column: Any, row: int) -> Any:
    """A cell of a batch's column: a numpy array where it is one of (lists of) lists of numbers,
    else Python's value. ValueError for lists of different lengths, and nulls in them."""
    pa, compute = library("pyarrow", _WHAT), library("pyarrow.compute", _WHAT)
    values = getattr(column, "storage", column).slice(row, 1)  # of an extension: what it stores
    shape: list[int] = []
    while _is_list(pa, values.type):
        if values.null_count:
            if not shape:
                return None
            raise ValueError("a list in it is missing (null)")
        lengths = compute.list_value_length(values).unique().to_pylist()
        if len(lengths) > 1:
            raise ValueError(f"its lists are of different lengths ({lengths[0]}, {lengths[1]}, …)")
        shape.append(lengths[0] if lengths else 0)
        values = values.flatten()
    if not shape or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return column[row].as_py()
    if values.null_count:
        raise ValueError("a number in it is missing (null)")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _is_list(pa: Any, kind: Any) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
