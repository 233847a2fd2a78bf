"""The ledger of files/: right across processes and crashes, and its cost does not grow with it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.store import room
from shards.store.atomic import written_whole
from shards.store.locks import locked
from shards.store.room import Room
from tests.conftest import subprocess_environment

SIZE = 10


class Clock:
    """A future in which file "i" is needed at every `period` from its own time on."""

    def __init__(self, times: dict[str, float], period: float = math.inf) -> None:
        self.times, self.period, self.now = times, period, 0.0

    def due(self, names: Sequence[str]) -> list[float]:
        return [self._due(name) for name in names]

    def _due(self, name: str) -> float:
        when = self.times.get(name, math.inf)
        if when < self.now - 1 and self.period < math.inf:
            when += -(-(self.now - 1 - when) // self.period) * self.period
        return -1.0 if self.now - 1 <= when <= self.now else when if when > self.now else math.inf

    def room(self, cache: Path, limit: int, **options: Any) -> Room:
        return Room(cache, limit, self.due, lambda: self.now, **options)


def put(where: Room, cache: Path, name: str, size: int = SIZE, after: float = 0.0) -> bool:
    """As a download does."""
    path = cache / "files" / name
    with written_whole(
        path, durable=False, alone=True, renaming=locked(cache, "room")
    ) as temporary:
        return where.take(temporary, name, size, after)


def held(cache: Path) -> set[str]:
    return {p.name for p in (cache / "files").iterdir()}


def fill(cache: Path, names: Sequence[str]) -> None:
    (cache / "files").mkdir(parents=True)
    for name in names:
        (cache / "files" / name).write_bytes(bytes(SIZE))


@pytest.mark.parametrize("seed", range(3))
def test_who_goes_is_who_is_due_last_as_time_goes_on(tmp_path: Path, seed: int) -> None:
    """Against all files' futures asked anew each time."""
    rng = np.random.default_rng(seed)
    names = [str(i) for i in range(40)]
    clock = Clock({n: float(rng.integers(2, 400)) for n in names}, period=400)
    where = clock.room(tmp_path, 15 * SIZE)
    there: set[str] = set()
    for now in range(0, 2000, 3):
        clock.now = float(now)
        name = str(rng.choice(names))
        if name in there:
            continue
        (own,) = clock.due([name])
        due = dict(zip(sorted(there), clock.due(sorted(there)), strict=True))
        last = max(due.values(), default=0)
        placed = put(where, tmp_path, name, after=max(own, 0.0))
        if len(there) < 15:
            assert placed
        else:
            assert placed == (last > max(own, 0.0))
            if placed:
                (gone,) = there - held(tmp_path)
                assert due[gone] == last
                there.remove(gone)
        if placed:
            there.add(name)
        assert held(tmp_path) == there


def test_what_a_download_costs_does_not_grow_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def cost(files: int) -> int:
        cache = tmp_path / str(files)
        names = [f"{i:05d}" for i in range(files)]
        fill(cache, names)
        soon = {f"new{i}": 1.0 for i in range(100)}
        clock = Clock(soon | {n: float(i + 2) for i, n in enumerate(names)})
        where = clock.room(cache, files * SIZE)
        where.shrink()
        calls.clear()
        for i in range(100):
            assert put(where, cache, f"new{i}")
        assert held(cache) == {*names[:-100], *(f"new{i}" for i in range(100))}
        assert not calls["scandir"]
        return calls["asked"]

    scandir = os.scandir

    def counted(*arguments: Any) -> Any:
        calls["scandir"] += 1
        return scandir(*arguments)

    monkeypatch.setattr(os, "scandir", counted)
    due = Clock.due

    def asking(self: Clock, names: Sequence[str]) -> list[float]:
        calls["asked"] += len(names)
        return due(self, names)

    monkeypatch.setattr(Clock, "due", asking)
    few, many = cost(300) - 300, cost(5000) - 5000  # once each at first
    assert many <= few + 10


def test_processes_know_of_each_other(tmp_path: Path) -> None:
    clock = Clock({"a": 5.0, "b": 9.0, "c": 7.0, "d": 3.0})
    one, other = clock.room(tmp_path, 3 * SIZE), clock.room(tmp_path, 3 * SIZE)
    lost: list[str] = []
    third = clock.room(tmp_path, 3 * SIZE, lost=lost.append)
    assert put(one, tmp_path, "a") and put(other, tmp_path, "b") and put(third, tmp_path, "c")
    assert put(one, tmp_path, "d", after=3.0) and held(tmp_path) == {"a", "c", "d"}
    assert not put(other, tmp_path, "b", after=9.0) and not lost
    assert put(third, tmp_path, "b", after=6.0) and held(tmp_path) == {"a", "b", "d"}
    assert "b" in lost and "c" in lost
    # One without a limit says what it adds, too.
    (tmp_path / "files" / "e").write_bytes(bytes(SIZE))
    room.add(tmp_path, tmp_path / "files" / "e", SIZE)
    assert put(one, tmp_path, "c", after=7.0) and held(tmp_path) == {"a", "c", "d"}


DYING = """
import os, sys
from pathlib import Path
from shards.store import room
cache, at = Path(sys.argv[1]), sys.argv[2]
real = os.write if at == "write" else os.unlink
where = room.Room(cache, 30, lambda names: [float(n) for n in names])
where.shrink()
if at == "open":  # reserved, and not there yet
    room.open = lambda path, *a: os._exit(1) if str(path).endswith(".tmp") else open(path, *a)
if at == "write":  # the evicted one is gone, and nobody was told
    os.write = lambda *a: os._exit(1)
where.take(cache / "files" / ".4.tmp", "4", 10, 0.0)
os._exit(0)
"""


@pytest.mark.parametrize("at", ["open", "write", "end"])
def test_a_process_that_dies_takes_no_room_for_ever(tmp_path: Path, at: str) -> None:
    fill(tmp_path, ["1", "2", "3"])
    child = [sys.executable, "-c", DYING, str(tmp_path), at]
    subprocess.run(child, env=subprocess_environment(), check=False, timeout=60)
    assert "3" not in held(tmp_path)
    where = Room(tmp_path, 3 * SIZE, lambda names: [float(n) for n in names])
    for name in ("5", "6", "7"):
        assert put(where, tmp_path, name)
        assert sum(p.stat().st_size for p in (tmp_path / "files").iterdir()) <= 3 * SIZE
    assert {"1", "2", "7"} == held(tmp_path)


@pytest.mark.parametrize("content", [b"", b"torn", b"x\n10 a\n", None])
def test_a_ledger_that_says_nothing_is_made_anew(tmp_path: Path, content: bytes | None) -> None:
    clock = Clock({"a": 5.0, "b": 9.0, "c": 7.0})
    fill(tmp_path, ["a", "b"])
    where = clock.room(tmp_path, 2 * SIZE)
    where.shrink()
    ledger = tmp_path / "room"
    good = ledger.read_bytes()
    if content is None:  # a line of the last one is torn
        ledger.write_bytes(good + b"10 c")
    else:
        ledger.write_bytes(content)
    for again in (where, clock.room(tmp_path, 2 * SIZE)):
        assert put(again, tmp_path, "c", after=7.0) or "c" in held(tmp_path)
        assert held(tmp_path) == {"a", "c"}


@pytest.mark.parametrize("at", [0, 3, -12, -3])
def test_a_flipped_bit_in_the_ledger_is_found(tmp_path: Path, at: int) -> None:
    clock = Clock({"a": 5.0, "b": 9.0, "c": 7.0})
    fill(tmp_path, ["a", "b"])
    clock.room(tmp_path, 2 * SIZE).shrink()
    ledger = tmp_path / "room"
    head, *lines = ledger.read_bytes().splitlines(keepends=True)
    for i in range(len(lines)):
        line = bytearray(lines[i])
        line[at] ^= 2
        ledger.write_bytes(b"".join([head, *lines[:i], line, *lines[i + 1 :]]))
        where = clock.room(tmp_path, 2 * SIZE)
        where.shrink()
        assert ledger.read_bytes().splitlines()[1:] == [x.rstrip(b"\n") for x in lines]


def test_the_ledger_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_SPARE", 20)
    times = {str(i): float(1000 - i) for i in range(300)}
    one, other = (Clock(times).room(tmp_path, 3 * SIZE) for _ in range(2))
    for i in range(300):
        assert put(other if i % 50 == 49 else one, tmp_path, str(i))
        assert len((tmp_path / "room").read_bytes().splitlines()) < 40
    assert len(held(tmp_path)) == 3
