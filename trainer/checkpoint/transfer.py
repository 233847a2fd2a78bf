"""Files from ranks to ranks of other nodes, by torch.distributed, verified as they arrive."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
import torch.distributed as dist

# Bytes of all pieces that a rank holds at a time, and of the smallest and largest piece.
_BUFFERS, _SMALLEST, _LARGEST = 64 << 20, 1 << 20, 16 << 20


@dataclass(frozen=True)
class Move:
    """A file of one rank's folder that another one is to have in its."""

    name: str
    size: int
    sha256: str
    source: int
    """The rank that has it."""
    target: int


class _End:
    """One rank's end of a move. Its faults do not stop it, or the other end would wait."""

    def __init__(self, move: Move, tag: int, sends: bool, piece: int) -> None:
        self.move, self.tag, self.sends = move, tag, sends
        self.buffer = torch.empty(min(piece, move.size), dtype=torch.uint8)
        self.problem = ""
        self._digest = hashlib.sha256()

    def begin(self, count: int, f: FileIO | None, group: dist.ProcessGroup | None) -> dist.Work:
        """Have the next `count` bytes sent or received."""
        part = self.buffer[:count]
        if not self.sends:
            work = dist.irecv(part, self.move.source, group, self.tag)
        else:
            try:
                if f and f.readinto(part.numpy().data) != count:
                    self.problem = f"{self.move.name} is shorter than it was"
            except OSError as error:
                self.problem = f"{self.move.name} cannot be read: {error.strerror}"
            work = dist.isend(part, self.move.target, group, self.tag)
        assert work is not None
        return work

    def end(self, count: int, f: FileIO | None) -> None:
        """Put away what was received."""
        if self.sends or f is None or self.problem:
            return
        part = self.buffer[:count].numpy().data
        self._digest.update(part)
        try:
            if f.write(part) != count:
                self.problem = f"{self.move.name} cannot be written whole"
        except OSError as error:
            self.problem = f"{self.move.name} cannot be written: {error.strerror}"

    @contextlib.contextmanager
    def file(self, folder: Path) -> Iterator[FileIO | None]:
        """The file to read, or to write: it has its name once it is whole."""
        path = folder / self.move.name
        if self.sends:
            try:
                f = open(path, "rb", buffering=0)  # noqa: SIM115
            except OSError as error:
                self.problem = f"{self.move.name} cannot be read: {error.strerror}"
                yield None
            else:
                with f:
                    yield f
            return
        temporary = folder / f".{self.move.name}.{secrets.token_hex(4)}.tmp"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            try:
                f = open(os.open(temporary, flags, 0o600), "wb", buffering=0)  # noqa: SIM115
            except OSError as error:
                self.problem = f"{self.move.name} cannot be written: {error.strerror}"
                yield None
                return
            with f:
                yield f
                if not self.problem and self._digest.hexdigest() != self.move.sha256:
                    self.problem = f"{self.move.name} arrived damaged"
            try:
                if not self.problem:
                    os.replace(temporary, path)
            except OSError as error:
                self.problem = f"{self.move.name} cannot be written: {error.strerror}"
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def exchange(moves: Sequence[Move], folder: Path, group: dist.ProcessGroup | None) -> str:
    """Make the moves that this rank has a part in; what went wrong with one of them, or "".

    moves: the same on every rank. folder: this rank's. All moves go on at once, piece by piece in
    step, so that no two ranks wait for each other. A rank that is lost raises RuntimeError.
    """
    rank = dist.get_rank()
    parts = Counter(r for m in moves for r in (m.source, m.target))
    piece = max(_SMALLEST, min(_LARGEST, _BUFFERS // max([1, *parts.values()])))
    with contextlib.ExitStack() as stack:
        ends = [
            _End(move, tag, rank == move.source, piece)
            for tag, move in enumerate(moves)
            if rank in (move.source, move.target)
        ]
        files = [stack.enter_context(end.file(folder)) for end in ends]
        for at in range(0, max((e.move.size for e in ends), default=0), piece):
            under_way = []
            for end, f in zip(ends, files, strict=True):
                if (count := min(piece, end.move.size - at)) > 0:
                    under_way.append((end, f, count, end.begin(count, f, group)))
            for end, f, count, work in under_way:
                work.wait()
                end.end(count, f)
    return next((e.problem for e in ends if e.problem), "")
