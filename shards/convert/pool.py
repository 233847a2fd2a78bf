"""Parts in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol

from shards.convert.part import PartSettings, Receipt, make_part
from shards.convert.plan import PlannedImage
from shards.errors import DataError
from shards.processes import end_with_parent, make_home, without_signals

Parts = Iterable[tuple[int, list[PlannedImage]]]


class RunParts(Protocol):
    """Makes parts somewhere."""

    def __call__(self, settings: PartSettings, parts: Parts) -> Iterator[Receipt]:
        """The receipts of all parts, in order; few parts are under way, or waited for, at a time.
        DataError of the first part that has one."""


def in_processes(workers: int | None = None) -> RunParts:
    """Makes parts in so many processes; 0 and 1: in this one; None: one a core."""
    count = len(os.sched_getaffinity(0)) if workers is None else workers
    return _here if count <= 1 else _Pool(count)


def _here(settings: PartSettings, parts: Parts) -> Iterator[Receipt]:
    for part, images in parts:
        yield make_part(settings, part, images)


class _Pool:
    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __call__(self, settings: PartSettings, parts: Parts) -> Iterator[Receipt]:
        make_home()
        # Spawned: a forked child inherits locks that other threads of this process may hold.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_begin, initargs=(settings,)
        )

        def submit(part: tuple[int, list[PlannedImage]]) -> Future[Receipt]:
            with without_signals(signal.SIGINT):  # the first starts the processes
                return pool.submit(_make, *part)

        try:
            yield from in_order(parts, submit, 3 * self.workers)
        except BrokenProcessPool:
            raise DataError(
                "a process of the build was killed (for lack of memory, perhaps): run the same "
                "command again, with fewer --workers; it goes on with what is whole"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def in_order(
    parts: Parts,
    submit: Callable[[tuple[int, list[PlannedImage]]], Future[Receipt]],
    at_once: int,
) -> Iterator[Receipt]:
    """Receipts in the order of the parts, with at most so many parts submitted and not yielded."""
    waiting: deque[Future[Receipt]] = deque()
    for part in parts:
        waiting.append(submit(part))
        while waiting and (len(waiting) > at_once or waiting[0].done()):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_settings: PartSettings | None = None  # of this process's build


def _begin(settings: PartSettings) -> None:
    global _settings
    end_with_parent()
    _settings = settings


def _make(part: int, images: list[PlannedImage]) -> Receipt:
    assert _settings is not None
    return make_part(_settings, part, images)
