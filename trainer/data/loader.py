"""The batches of the steps to come, in order, made in this process or ahead of it in workers.

A step is (sampler state, number of pairs): whoever holds it makes this rank's micro-batches, so
any number of loader workers gives the same stream and there is nothing of theirs to save.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from model.batch import Batch
from shards.dataset import Dataset
from shards.store.prefetch import LookAhead, ShardError, check_limit
from shards.order.lookahead import next_use, next_windows, windows_at, working_set
from shards.order.sampler import SamplerState, plan, steps_ahead
from shards.order.streams import SamplerSettings, Stream
from trainer.data.batch import BatchSettings, make_batch
from trainer.data.shared_batches import Packed, SharedBatches, make_in_slot


@dataclass(frozen=True)
class RankSlice:
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
class MissingShard:
    """In place of a step's micro-batches: a shard that cannot be had, and why."""

    shard: int
    message: str


Loaded = list[Batch] | MissingShard


def bounds(count: int, part: int, parts: int) -> tuple[int, int]:
    """The part-th of `parts` slices of `count` things; sizes differ by at most one."""
    return count * part // parts, count * (part + 1) // parts


@dataclass
class _StepBatches(TorchDataset[list[Packed | Batch] | MissingShard]):
    """Maps a step, (state before it, number of pairs), to this rank's micro-batches.

    in_flight: pairs that other processes of the node may be ahead or behind; total: of the run.
    """

    data: Dataset
    sampler: SamplerSettings
    streams: tuple[Stream, ...]
    batch: BatchSettings
    share: RankSlice
    threads: int
    in_flight: int
    total: int
    slots: SharedBatches
    _windows: tuple[int, ...] = ()

    def __getitem__(self, step: tuple[SamplerState, int]) -> list[Packed | Batch] | MissingShard:
        state, count = step
        self._look_ahead(state)
        begin, end = bounds(count, self.share.rank, self.share.world)
        own = plan(self.sampler, self.streams, state, count, begin, end)
        slices = [
            own.take(slice(*bounds(len(own), i, self.share.accumulation)))
            for i in range(self.share.accumulation)
        ]
        skipped = [shard for shard, _ in state.skipped]
        worker = get_worker_info()
        group = worker.id if worker else 0
        made: list[Packed | Batch] = []
        try:
            for part in slices:
                make = partial(
                    make_batch, self.data, self.streams, part.without(skipped), self.batch
                )
                made.append(make_in_slot(self.slots, group, make))
        except ShardError as error:
            for packed in made:
                if isinstance(packed, Packed):
                    self.slots.release(packed.slot)
            return MissingShard(error.shard, str(error))
        return made

    def _look_ahead(self, state: SamplerState) -> None:
        """Tell the shards what comes, whenever a stream enters another window."""
        arguments = self.sampler, self.streams, state
        windows = windows_at(*arguments, self.in_flight)
        if windows == self._windows:
            return
        self._windows = windows
        due = next_use(*arguments, self.in_flight)
        due[[shard for shard, _ in state.skipped]] = np.inf
        ahead = LookAhead(
            due,
            mine=next_use(*arguments) == 0,
            soon=next_windows(*arguments, self.in_flight),
            until=self.total - state.consumed,
        )
        worker = get_worker_info()
        # Of several workers one fetches ahead: downloads are bounded, and the plan is the same.
        threads = self.threads if worker is None or worker.id == 0 else 0
        self.data.shards.look_ahead(ahead, threads)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_windows": ()}


def load_steps(
    data: Dataset,
    sampler: SamplerSettings,
    streams: Sequence[Stream],
    batch: BatchSettings,
    share: RankSlice,
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

    # Ready, being made, and in the reader's hands: of each worker, for each micro-batch.
    ready = (settings.prefetch if settings.workers else 0) + 2
    largest = -(-global_batch // (share.world * share.accumulation))
    size = _slot_size(data, batch, largest)
    slots = SharedBatches(
        max(settings.workers, 1), ready * share.accumulation, size, shared=settings.workers > 0
    )
    maker = _StepBatches(
        data, sampler, tuple(streams), batch, share, settings.threads, in_flight, total, slots
    )
    steps = steps_ahead(sampler, streams, state, global_batch, total)
    if not settings.workers:
        return _read(map(maker.__getitem__, steps), data, slots)
    context = multiprocessing.get_context(settings.start)
    if settings.start == "forkserver":
        # Workers share the pages of what the server that they are forked from has imported.
        context.set_forkserver_preload(["trainer.data.preload"])
    loader = DataLoader(
        maker,
        batch_size=None,
        sampler=_Once(steps),
        num_workers=settings.workers,
        prefetch_factor=settings.prefetch,
        multiprocessing_context=context,
        worker_init_fn=_end_with_parent,
    )
    return _read(iter(loader), data, slots)


def _slot_size(data: Dataset, batch: BatchSettings, pairs: int) -> int:
    """Bytes that a batch of so many pairs of distinct images takes, hardly ever more."""
    schema = data.manifest.schema
    features = schema.max_objects * schema.feature_dim * 2
    swapped = int(features * min(1.0, 0.2 * batch.object_mask))
    small = schema.max_tokens * 40 + schema.max_objects * 80 + 256
    return pairs * (features + swapped + small) + (1 << 16)


def _read(
    batches: Iterator[list[Packed | Batch] | MissingShard], data: Dataset, slots: SharedBatches
) -> Generator[Loaded, None, None]:
    pinned = torch.cuda.is_available()

    def unpacked(made: Packed | Batch) -> Batch:
        batch = slots.read(made) if isinstance(made, Packed) else made
        return batch.pin_memory() if pinned else batch

    try:
        for made in batches:
            yield made if isinstance(made, MissingShard) else [unpacked(m) for m in made]
            del made
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
