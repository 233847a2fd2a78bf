"""Predictions under way: an SQLite file, so that memory does not grow with them, and a call that is
cut loses a batch."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from shards.errors import DataError, explained

END = ".partial"
"""Of the file's name, after that of the predictions."""
Key = str | int | None
"""The id of a question; None where it needs none."""
_LARGEST = 2**63


class QuestionsError(DataError):
    """The data set has questions that cannot be told apart: what was predicted is of no use."""


class Partial:
    """What is predicted so far for a file of predictions."""

    def __init__(self, out: Path, meta: dict[str, str]) -> None:
        """meta: what the predictions follow from, in words -> its value."""
        self.path, self._meta = out.with_name(out.name + END), meta
        self.done = 0
        """Pairs that were asked."""

    @contextmanager
    def opened(self) -> Iterator[Partial]:
        """The file, which is this call's alone. It is gone where the block ends well, or finds that
        the data set is of no use.

        DataError where another call has it, where it is damaged or follows from something else, and
        where it cannot be written.
        """
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._lock()
        try:
            with _sqlite_explained(self.path):
                with closing(sqlite3.connect(self.path, isolation_level=None)) as self._database:
                    try:
                        self._begin()
                        yield self
                    except QuestionsError:
                        self.path.unlink()
                        raise
                self.path.unlink()
        finally:
            os.close(lock)

    def _lock(self) -> int:
        """A lock that goes with this process. SQLite's own are of another kind."""
        while True:
            lock = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise DataError(
                    f"another call is predicting to {self.path}: wait for it, or name another file"
                ) from None
            try:
                if os.path.samestat(os.fstat(lock), os.stat(self.path)):
                    return lock
            except FileNotFoundError:
                pass  # the other call had just finished
            os.close(lock)

    def _begin(self) -> None:
        run = self._database.execute
        run("begin")
        run("create table if not exists meta (key text primary key, value text)")
        run(
            "create table if not exists answer "
            "(number integer primary key, id unique, row text, crc integer)"
        )
        before = dict(run("select key, value from meta").fetchall())
        done = before.pop("done", "0")
        if not done.isdigit():
            raise self._damaged()
        self.done = int(done)
        if before and before != self._meta:
            changed = [key for key in self._meta if before.get(key) != self._meta[key]]
            other = changed[0] if changed else "version"
            raise DataError(
                f"{self.path} has predictions of another {other}: remove it, or name another file"
            )
        for key, value in self._meta.items():
            run("insert or replace into meta values (?, ?)", (key, value))
        run("commit")

    def add(self, found: Sequence[tuple[Key, dict[str, Any]]], pairs: int) -> None:
        """The answers of a batch of so many pairs, whole or not at all."""
        run = self._database.execute
        run("begin")
        for key, row in found:
            if isinstance(key, int) and not -_LARGEST <= key < _LARGEST:
                raise QuestionsError(f"the question id {key!r:.60} is beyond 64 bits")
            text = json.dumps(row)
            values = key, text, _crc(key, text)
            try:
                run("insert into answer (id, row, crc) values (?, ?, ?)", values)
            except sqlite3.IntegrityError:
                raise QuestionsError(
                    f"the question id {key!r:.60} comes twice in the data set: build it from files "
                    "of one split"
                ) from None
        self.done += pairs
        run("insert or replace into meta values ('done', ?)", (str(self.done),))
        run("commit")

    @property
    def answers(self) -> int:
        return int(self._database.execute("select count(*) from answer").fetchone()[0])

    def rows(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """In the order of the ids, numbers before texts; without ids, as they came. DataError where
        one is not as it was."""
        found = self._database.execute("select id, row, crc from answer order by id, number")
        for key, text, crc in found:
            if not isinstance(text, str) or _crc(key, text) != crc:
                raise self._damaged()
            yield key, json.loads(text)

    def _damaged(self) -> DataError:
        return DataError(f"{self.path} is damaged: remove it, and predict again")


def _crc(key: Key, text: str) -> int:
    return zlib.crc32(f"{key!r} {text}".encode())


@contextmanager
def _sqlite_explained(path: Path) -> Iterator[None]:
    """Errors of SQLite as one of ours, with a remedy."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise DataError(
            f"cannot keep predictions in {path}: {error}; make room or give rights, and the same "
            "command goes on, or name another place with --out"
        ) from None
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} is damaged ({error}): remove it, and predict again") from None
