"""The batches of the steps to come, in order, made in this process or ahead of it in workers.

A step is (sampler state, number of pairs): whoever holds it makes this rank's micro-batches, so
any number of loader workers gives the same stream and there is nothing of theirs to save.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from model.batch import Batch
from shards.dataset import Dataset, open_dataset
from shards.fetch import Outlook, ShardError, check_limit
from shards.sampler import (
    SamplerSettings,
    SamplerState,
    Stream,
    next_use,
    next_windows,
    plan,
    steps_ahead,
    windows_at,
    working_set,
)
from trainer.batch import BatchSettings, make_batch


@dataclass(frozen=True)
class Share:
    """Which part of every step is made here: rank of world, in micro-batches."""

    rank: int
    world: int
    accumulation: int


@dataclass(frozen=True)
class LoaderSettings:
    """workers: processes that make batches ahead (0 = none), started by `start`; prefetch: steps
    that each keeps ready; threads: downloads at once."""

    workers: int = 0
    prefetch: int = 2
    threads: int = 8
    start: Literal["forkserver", "spawn", "fork"] = "forkserver"


@dataclass(frozen=True)
class Trouble:
    """In place of a step's micro-batches: a shard that cannot be had, and why."""

    shard: int
    message: str


Loaded = list[Batch] | Trouble


def bounds(count: int, part: int, parts: int) -> tuple[int, int]:
    """The part-th of `parts` slices of `count` things; sizes differ by at most one."""
    return count * part // parts, count * (part + 1) // parts


@dataclass
class _StepBatches(TorchDataset[Loaded]):
    """Maps a step, (state before it, number of pairs), to this rank's micro-batches.

    in_flight: pairs that other processes of the node may be ahead or behind; total: of the run.
    """

    data: Dataset
    sampler: SamplerSettings
    streams: tuple[Stream, ...]
    batch: BatchSettings
    share: Share
    threads: int
    in_flight: int
    total: int
    _windows: tuple[int, ...] = ()
    _buffers: _Buffers | None = field(default=None)

    def __getitem__(self, step: tuple[SamplerState, int]) -> Loaded:
        state, count = step
        self._look_ahead(state)
        begin, end = bounds(count, self.share.rank, self.share.world)
        own = plan(self.sampler, self.streams, state, count, begin, end)
        slices = [
            own.take(slice(*bounds(len(own), i, self.share.accumulation)))
            for i in range(self.share.accumulation)
        ]
        skipped = [shard for shard, _ in state.skipped]
        empty = _shared if get_worker_info() else self._own_memory
        try:
            return [
                make_batch(self.data, self.streams, s.without(skipped), self.batch, empty)
                for s in slices
            ]
        except ShardError as error:
            return Trouble(error.shard, str(error))

    def _look_ahead(self, state: SamplerState) -> None:
        """Tell the shards what comes, whenever a stream enters another window."""
        arguments = self.sampler, self.streams, state
        windows = windows_at(*arguments, self.in_flight)
        if windows == self._windows:
            return
        self._windows = windows
        due = next_use(*arguments, self.in_flight)
        due[[shard for shard, _ in state.skipped]] = np.inf
        outlook = Outlook(
            due,
            mine=next_use(*arguments) == 0,
            soon=next_windows(*arguments, self.in_flight),
            until=self.total - state.consumed,
        )
        worker = get_worker_info()
        # Of several workers one fetches ahead: downloads are bounded, and the plan is the same.
        threads = self.threads if worker is None or worker.id == 0 else 0
        self.data.shards.look_ahead(outlook, threads)

    def _own_memory(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self._buffers is None:
            self._buffers = _Buffers()
        return self._buffers.empty(shape)

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the files itself: only names travel.
        data = (self.data.places, self.data.cache, self.data.shards.limit)
        return {**self.__dict__, "data": data, "_buffers": None, "_windows": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"data": open_dataset(*state["data"])})


def _shared(shape: tuple[int, ...]) -> torch.Tensor:
    """An fp16 tensor in memory that goes to the consumer without a copy."""
    size = 2 * int(np.prod(shape))
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=torch.float16).set_(storage, 0, shape)  # type: ignore[call-overload]


_HUGE_PAGE = 2 << 20


class _Buffers:
    """fp16 tensors over memory that is used again once nothing refers to it any more: fresh pages
    for 38 MB of features would cost as much as filling them."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        count = int(np.prod(shape))
        memory = self._free.pop() if self._free else None
        if memory is None or len(memory) < 2 * count:
            # With room to spare, as the number of distinct images in a batch varies.
            memory = mmap.mmap(-1, -(-max(count, 1) * 5 // 2 // _HUGE_PAGE) * _HUGE_PAGE)
            memory.madvise(mmap.MADV_HUGEPAGE)
        root = np.frombuffer(memory, dtype=np.float16)
        # Every view holds its root, the tensor's storage too.
        weakref.finalize(root, self._free.append, memory)
        return torch.from_numpy(root[:count]).view(shape)


def load_steps(
    data: Dataset,
    sampler: SamplerSettings,
    streams: Sequence[Stream],
    batch: BatchSettings,
    share: Share,
    state: SamplerState,
    global_batch: int,
    total: int,
    settings: LoaderSettings,
    beside: int = 0,
) -> Generator[Loaded, None, None]:
    """This rank's micro-batches of each step from `state` until `total` pairs are consumed. Close
    it to end its workers and threads.

    Raises DataError where the cache limit cannot hold what the steps in flight need, and `beside`
    bytes that are in use for other purposes.
    """
    # The main processes are within a step of each other. Ahead of them are the steps that workers
    # keep ready; behind them each worker may still hold what its last step used.
    in_flight = global_batch * (1 + settings.workers * (settings.prefetch + 1))
    need = working_set(sampler, streams, data.shards.remote_sizes, in_flight + global_batch)
    check_limit(data.shards, need + beside)
    maker = _StepBatches(
        data, sampler, tuple(streams), batch, share, settings.threads, in_flight, total
    )
    steps = steps_ahead(sampler, streams, state, global_batch, total)
    context = None
    if settings.workers:
        context = multiprocessing.get_context(settings.start)
        if settings.start == "forkserver":
            # Workers share the pages of what the server that they are forked from has imported.
            context.set_forkserver_preload(["trainer.preload"])
    loader = DataLoader(
        maker,
        batch_size=None,
        sampler=_Once(steps),
        num_workers=settings.workers,
        prefetch_factor=settings.prefetch if settings.workers else None,
        multiprocessing_context=context,
        worker_init_fn=_end_with_parent,
        pin_memory=torch.cuda.is_available(),
    )
    return _closing(iter(loader), data)


def _closing(batches: Iterator[Loaded], data: Dataset) -> Generator[Loaded, None, None]:
    try:
        yield from batches
    finally:
        data.shards.stop()


def _end_with_parent(worker: int) -> None:
    """End this worker when the process that it works for is killed. torch looks at the parent's
    id, which is the server's here: the two would keep each other alive, and files in use."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="lxscale-parent", daemon=True).start()


class _Once:
    """An iterator as the sampler that DataLoader wants."""

    def __init__(self, steps: Iterator[tuple[SamplerState, int]]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[tuple[SamplerState, int]]:
        return self._steps
