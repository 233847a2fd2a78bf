"""The errors of the data side."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.urls import shown

# What to do about a fault of this machine, by its number.
_REMEDIES = {
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "let the machine open more files (sysctl fs.file-max)",
    errno.ENOMEM: "free memory, or raise the limit of it",
}
_REMEDY = "make room or rights there, or name another cache folder in LXSCALE_CACHE"


class DataError(ValueError):
    """Input data, a data set or an object store is not as it must be; the message names the thing
    (file, line, key) and the remedy. URLs in it are shown without passwords."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message))


class NotFoundError(DataError):
    """The object is not there."""


class StoreError(DataError):
    """The object store was away, or failed, for longer than its deadline: later it may not."""


class ShardError(DataError):
    """A shard cannot be had; `shard` is its number."""

    def __init__(self, message: object, shard: int) -> None:
        super().__init__(message)
        self.shard = shard


class NodeError(DataError):
    """This machine lacks something: room, rights, descriptors, memory, a sound disk. The data is
    none the worse: on another machine, or once that is mended, it can be used."""


def of_node(error: OSError) -> bool:
    """Whether it is for lack of descriptors or memory, whatever the file."""
    return error.errno in _REMEDIES


def node_error(place: str | Path, error: OSError) -> NodeError:
    """A fault of this machine for its user; place: what to name if the error names no file."""
    remedy = _REMEDIES.get(error.errno or 0, _REMEDY)
    return NodeError(f"cannot use {error.filename or place}: {error.strerror or error}; {remedy}")


@contextmanager
def explained(place: str | Path) -> Iterator[None]:
    """Turns the errors of a file system into errors that say what to do: DataError where a file is
    not there, NodeError otherwise."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or place} does not exist") from None
    except OSError as error:
        raise node_error(place, error) from None
