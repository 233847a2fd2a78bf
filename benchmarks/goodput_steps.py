"""Steps as worker 0 of each group writes them down, in every arm of goodput.py, and their account.

A group is a set of workers that trains together until a fault; each of its rank 0s has a file of
its own: a line `workers N TIME`, then `begin STEP TIME` and `end STEP TIME` by turns.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

NODES = 4
"""The most that there are, and workers."""


@dataclass(frozen=True)
class Pace:
    """How long a step takes at least, however quick the machine: cores are fewer than workers here,
    and what they fight for is not what is measured."""

    folder: Path
    """Of the files."""
    seconds: float
    """Of a step on NODES workers. The same batch takes as much longer as there are fewer."""

    def step_seconds(self, world: int) -> float:
        return self.seconds * NODES / world


class StepLog:
    """The file of this process; nothing is written in a process that is not rank 0."""

    def __init__(self, pace: Pace, rank: int, world: int) -> None:
        self._least = pace.step_seconds(world)
        name = pace.folder / f"{time.time_ns()}-{os.getpid()}.txt"
        # Line by line: what is written stays when the process is killed.
        # Open as long as the process lives.
        self._file = open(name, "w", buffering=1) if rank == 0 else None  # noqa: SIM115
        self._tell("workers", world, time.time())

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step, of this number from 1 on; lasts as long as the pace says."""
        began = time.time()
        self._tell("begin", number, began)
        yield
        time.sleep(max(0.0, began + self._least - time.time()))
        self._tell("end", number, time.time())

    def _tell(self, what: str, number: int, at: float) -> None:
        if self._file:
            self._file.write(f"{what} {number} {at:.4f}\n")


@dataclass(frozen=True)
class Group:
    workers: int
    steps: tuple[tuple[int, float, float], ...]
    """In order: (number, begin, end)."""


def read_groups(folder: Path) -> list[Group]:
    """Those that have ended a step, in the order of time. A step that was cut short is none."""
    groups = []
    for path in sorted(folder.glob("*.txt")):
        steps: list[tuple[int, float, float]] = []
        began, workers = 0.0, 0
        for line in path.read_text().splitlines(keepends=True):
            what, number, at = line.split() if line.endswith("\n") else ("cut", "0", "0")
            if what == "workers":
                workers = int(number)
            elif what == "begin":
                began = float(at)
            elif what == "end":
                steps.append((int(number), began, float(at)))
        if steps:
            groups.append(Group(workers, tuple(steps)))
    return sorted(groups, key=lambda g: g.steps[0][1])


def newest_step(folder: Path) -> int:
    """The last that any group has ended; reads the ends of the files alone."""
    most = 0
    for path in folder.glob("*.txt"):
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 256))
            lines = file.read().decode().splitlines(keepends=True)[1:]
        ended = [line.split()[1] for line in lines if line.startswith("end") and "\n" in line]
        most = max(most, *map(int, ended), 0)
    return most


@dataclass(frozen=True)
class Account:
    """What became of the steps; seconds are of the wall, whatever the number of workers."""

    kept: int
    """Steps that the last group stood on when it ended, its own among them: no arm is charged for
    what it would have lost later."""
    made: int
    """All that were ended, those made again counted each time."""
    kept_seconds: float
    """Of the last making of each kept step."""
    wasted_seconds: float
    """Of all others."""
    wall: float
    of_nodes: float
    """Of the time of the nodes that were there, NODES at most at a time, the part that the kept
    steps take at the pace."""
    workers: tuple[int, ...]
    """Of each group."""
    recovery: float | None
    """Mean seconds from the last end of a step in a group to the first begin in the next."""

    @property
    def wasted(self) -> int:
        return self.made - self.kept

    @property
    def recoveries(self) -> int:
        """Groups after the first."""
        return max(0, len(self.workers) - 1)

    @property
    def goodput(self) -> float:
        return self.kept_seconds / self.wall


def account(groups: list[Group], wall: float, node_seconds: float, pace: Pace) -> Account:
    """Of a run that went on for `wall` seconds. node_seconds: of all nodes that were there.
    ValueError where a step was passed over."""
    kept = groups[-1].steps[-1][0] if groups else 0
    seconds: dict[int, float] = {}
    spent = 0.0
    for number, began, ended in (s for group in groups for s in group.steps):
        seconds[number] = ended - began
        spent += ended - began
    kept_seconds = sum(s for number, s in seconds.items() if number <= kept)
    missing = [n for n in range(1, kept + 1) if n not in seconds]
    if missing:
        raise ValueError(f"step {missing[0]} was passed over")
    gaps = [b.steps[0][1] - a.steps[-1][2] for a, b in pairwise(groups)]
    return Account(
        kept=kept,
        made=sum(len(group.steps) for group in groups),
        kept_seconds=kept_seconds,
        wasted_seconds=spent - kept_seconds,
        wall=wall,
        of_nodes=kept * pace.seconds * NODES / node_seconds,
        workers=tuple(group.workers for group in groups),
        recovery=sum(gaps) / len(gaps) if gaps else None,
    )
