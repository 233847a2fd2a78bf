"""How loader.py measures: every contestant waits in processes of its own and runs in turn.

A round runs each contestant once, so that whatever else the machine does hits all alike. A run is
some batches to warm up, then batches for at least `seconds` and at least `batches`. Rates are
medians over the rounds.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

# One thread each: a core is what is measured. Set before numpy and torch start theirs.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_WARM_UP = 12  # batches before a run's clock starts: more than any loader here has ready ahead


@dataclass(frozen=True)
class Contestant:
    """open(*args, rank, processes) is called in each of its processes and returns endless
    iterators by column; an iterator yields, for each batch, its number of pairs."""

    name: str
    open: Callable[..., Mapping[str, Iterator[int]]]
    args: tuple[Any, ...]
    columns: tuple[str, ...]
    processes: int = 1


@dataclass(frozen=True)
class Length:
    """Of a run: at least `seconds` and at least `batches` in each process; rounds: runs each."""

    seconds: float = 3.0
    batches: int = 50
    rounds: int = 5


@dataclass
class Result:
    """pairs/s of each round; cores: CPU seconds per second, loader workers not counted."""

    rates: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def spread(self) -> str:
        return f"{min(self.rates):,.0f} to {max(self.rates):,.0f}"


def measure(
    contestants: Sequence[Contestant], length: Length, say: Callable[[str], None]
) -> dict[tuple[str, str], Result]:
    """Results by (contestant, column)."""
    os.environ.update(THREADS)
    groups: list[_Group] = []
    results: dict[tuple[str, str], Result] = {}
    try:
        for contestant in contestants:
            groups.append(_Group(contestant))
            for column in contestant.columns:
                # Not counted: fills shuffle buffers and touches every page.
                groups[-1].run(column, length)
                results[contestant.name, column] = Result()
            say(f"{contestant.name}: ready")
        for i in range(length.rounds):
            for group in groups:
                for column in group.contestant.columns:
                    rate, cores = group.run(column, length)
                    result = results[group.contestant.name, column]
                    result.rates.append(rate)
                    result.cores.append(cores)
            say(f"round {i + 1} of {length.rounds}")
    finally:
        for group in groups:
            group.close()
    return results


class _Group:
    """The processes of a contestant, which wait for `run`."""

    def __init__(self, contestant: Contestant) -> None:
        # Not fork: torch, s3fs and the peers have threads. Not daemons: loaders start workers.
        context = multiprocessing.get_context("spawn")
        self.contestant = contestant
        self._pipes: list[Connection] = []
        self._processes = []
        self._barrier = context.Barrier(contestant.processes)
        for rank in range(contestant.processes):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(contestant, rank, self._barrier, theirs))
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def run(self, column: str, length: Length) -> tuple[float, float]:
        """All processes at once: pairs per second and cores, of all of them together."""
        for pipe in self._pipes:
            pipe.send((column, length))
        try:
            parts = [pipe.recv() for pipe in self._pipes]
        except (EOFError, ConnectionResetError):
            raise SystemExit(f"{self.contestant.name} failed: see above") from None
        wall = max(p.ended for p in parts) - min(p.began for p in parts)
        return sum(p.pairs for p in parts) / wall, sum(p.cpu for p in parts) / wall

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


@dataclass(frozen=True)
class _Part:
    """What one process did: pairs between two times of the system's monotonic clock, in seconds."""

    pairs: int
    began: float
    ended: float
    cpu: float


def _serve(contestant: Contestant, rank: int, barrier: Any, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    columns = contestant.open(*contestant.args, rank, contestant.processes)
    while True:
        try:
            column, length = pipe.recv()
            pipe.send(_run(columns[column], length, barrier))
        except (EOFError, BrokenPipeError, BrokenBarrierError):
            return


def _run(batches: Iterator[int], length: Length, barrier: Any) -> _Part:
    for _ in range(_WARM_UP):
        next(batches)
    barrier.wait(600)
    began, cpu = time.monotonic(), time.process_time()
    pairs, done, now = 0, 0, began
    while now - began < length.seconds or done < length.batches:
        pairs += next(batches)
        done += 1
        now = time.monotonic()
    return _Part(pairs, began, now, time.process_time() - cpu)


def machine() -> str:
    """The processor and how many cores of it there are here."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [x.split(":")[1].strip() for x in text.splitlines() if x.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every column but the first is right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
