"""Parts in processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager

from shards.convert.part import Part, PartSettings, Receipt, make_part
from shards.errors import DataError
from shards.processes import end_with_parent, make_home, without_signals

RunParts = Callable[[PartSettings, Iterable[Part]], Iterator[Receipt]]
"""Makes parts somewhere: the receipts of all parts, in order; few parts are under way, or waited
for, at a time. DataError of the first part that has one."""

Workers = Callable[[], AbstractContextManager[RunParts]]
"""Starts what makes parts, and ends it."""


def in_processes(workers: int | None = None) -> Workers:
    """So many processes; 1: this one; None: one a core. They start while the inputs are listed."""
    count = len(os.sched_getaffinity(0)) if workers is None else workers

    @contextlib.contextmanager
    def start() -> Iterator[RunParts]:
        if count == 1:
            yield _here
            return
        make_home()
        # Spawned: a forked child inherits locks that other threads of this process may hold.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent)
        try:
            with without_signals(signal.SIGINT):
                for _ in range(count):
                    pool.submit(_ready)  # each finds no idle process, and so starts one
            yield lambda settings, parts: _run(pool, count, settings, parts)
        finally:
            pool.shutdown(cancel_futures=True)

    return start


def _here(settings: PartSettings, parts: Iterable[Part]) -> Iterator[Receipt]:
    for part in parts:
        yield make_part(settings, part)


def _ready() -> None:
    """Importing this module is what takes a while."""


def _run(
    pool: ProcessPoolExecutor, workers: int, settings: PartSettings, parts: Iterable[Part]
) -> Iterator[Receipt]:
    def submit(part: Part) -> Future[Receipt]:
        with without_signals(signal.SIGINT):  # it may start a process, in place of a dead one
            return pool.submit(make_part, settings, part)

    try:
        yield from in_order(parts, submit, 3 * workers)
        pool.shutdown(wait=False)  # they end while the manifest is made
    except BrokenProcessPool:
        raise DataError(
            "a process of the build was killed (for lack of memory, perhaps): run the same "
            "command again, with fewer --workers; it goes on with what is whole"
        ) from None


def in_order(
    parts: Iterable[Part], submit: Callable[[Part], Future[Receipt]], at_once: int
) -> Iterator[Receipt]:
    """Receipts in the order of the parts, with at most so many parts submitted and not yielded."""
    waiting: deque[Future[Receipt]] = deque()
    for part in parts:
        waiting.append(submit(part))
        while waiting and (len(waiting) > at_once or waiting[0].done()):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
