"""The batches of the steps to come, in order, made in this process or ahead of it in workers.

A step is all that it takes to make this rank's micro-batches of it. So any number of loader workers
gives the same stream, and none has a state to save.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from model.batch import Batch
from shards.dataset import Dataset
from shards.errors import DataError, NodeError, ShardError, StoreError
from shards.format.members import FEATURES_OF
from shards.order.lookahead import Future, working_set
from shards.order.sampler import Plan, Sampler, SamplerState, Step
from shards.processes import STOP_SIGNALS, end_with_parent, make_home, without_signals
from shards.store.prefetch import check_limit
from trainer.data.batch import BatchSettings, make_batch
from trainer.data.shared_batches import Packed, SharedBatches, make_in_slot
from trainer.sections import LoaderSettings

# Seconds between two looks whether loader workers live.
_LOOK_S = 0.5


@dataclass(frozen=True)
class RankSlice:
    """Which part of every step is made here: rank of world, in micro-batches."""

    rank: int
    world: int
    accumulation: int
    local: int | None = None
    """Ranks on this rank's node; None: all."""
    strict: bool = False
    """Micro-batches are the slices that as many ranks as there are of them in the step would take:
    the same at every number of ranks that divides it."""

    def micro_batches(self, sampler: Sampler, step: Step) -> Iterator[Plan]:
        """The pairs of each of this rank's micro-batches of a step."""
        if self.strict:
            for i in range(self.accumulation):
                yield sampler.slice(step, self.rank * self.accumulation + i, self._parts)
            return
        own = sampler.slice(step, self.rank, self.world)
        for i in range(self.accumulation):
            yield own.take(slice(*bounds(len(own), i, self.accumulation)))

    def lanes(self, sampler: Sampler) -> tuple[int, int]:
        """The lanes that they are of: [first, last)."""
        if not self.strict:
            return sampler.lanes_of(self.rank, self.world)
        first = self.rank * self.accumulation
        last = first + self.accumulation - 1
        return sampler.lanes_of(first, self._parts)[0], sampler.lanes_of(last, self._parts)[1]

    def on_node(self) -> tuple[int, int]:
        """How many slices of a step are made on the node, and of how many."""
        local = self.world if self.local is None else self.local
        return (local * self.accumulation, self._parts) if self.strict else (local, self.world)

    def largest(self, sampler: Sampler, count: int) -> int:
        """Pairs of a micro-batch of a step of `count`, hardly ever more."""
        if self.strict:
            return largest_slice(sampler, count, self._parts)
        return -(-largest_slice(sampler, count, self.world) // self.accumulation)

    @property
    def _parts(self) -> int:
        """Micro-batches of a step."""
        return self.world * self.accumulation


@dataclass(frozen=True)
class MissingShard:
    """A shard that cannot be had, and why."""

    shard: int
    message: str


@dataclass(frozen=True)
class Loaded:
    """A step with this rank's micro-batches of it, or with the shard that they lack."""

    step: Step
    batches: list[Batch]
    missing: MissingShard | None = None


@dataclass(frozen=True)
class _Made:
    """What a loader worker sends: `Loaded`, its batches perhaps in shared memory."""

    step: Step
    batches: list[Packed | Batch]
    missing: MissingShard | None = None
    fault: tuple[type[DataError], str] | None = None
    """What the run ends with; in words, as what a loader worker raises arrives with a traceback in
    its message."""


def bounds(count: int, part: int, parts: int) -> tuple[int, int]:
    """The part-th of `parts` slices of `count` things; sizes differ by at most one."""
    return count * part // parts, count * (part + 1) // parts


@dataclass
class _StepBatches(TorchDataset[_Made]):
    """Maps a step to this rank's micro-batches."""

    data: Dataset
    sampler: Sampler
    batch: BatchSettings
    part: RankSlice
    threads: int
    in_flight: int
    """Pairs that other processes of the node may be ahead or behind."""
    total: int
    """Pairs of the run."""
    shared: SharedBatches
    _future: Future | None = field(default=None, repr=False)

    def __getitem__(self, step: Step) -> _Made:
        skipped = step.before.skipped_shards
        worker = get_worker_info()
        group = worker.id if worker else 0
        made: list[Packed | Batch] = []
        try:
            self._look_ahead(step.before)
            for micro in self.part.micro_batches(self.sampler, step):
                make = partial(
                    make_batch,
                    self.data,
                    self.sampler,
                    micro.without(skipped),
                    self.batch,
                    skipped=skipped,
                )
                made.append(make_in_slot(self.shared, group, make))
        except DataError as error:
            for packed in made:
                if isinstance(packed, Packed):
                    self.shared.release(packed.slot)
            if isinstance(error, ShardError):
                return _Made(step, [], MissingShard(error.shard, str(error)))
            kind = next(k for k in (NodeError, StoreError, DataError) if isinstance(error, k))
            return _Made(step, [], fault=(kind, str(error)))
        return _Made(step, made)

    def _look_ahead(self, state: SamplerState) -> None:
        """Tell the shards what comes, whenever a stream enters another window."""
        if self._future is None:
            lanes = self.part.lanes(self.sampler)
            self._future = Future(self.sampler, lanes, self.in_flight, self.total)
        if self._future.at(state):
            worker = get_worker_info()
            # Of several workers one fetches ahead: downloads are bounded, and the plan is the same.
            threads = self.threads if worker is None or worker.id == 0 else 0
            self.data.shards.look_ahead(self._future.as_it_stands(), threads)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_future": None}


def load_steps(
    data: Dataset,
    sampler: Sampler,
    batch: BatchSettings,
    part: RankSlice,
    state: SamplerState,
    global_batch: int,
    total: int,
    settings: LoaderSettings,
    beside: int = 0,
) -> Generator[Loaded, None, None]:
    """This rank's micro-batches of each step from `state` until `total` pairs are consumed. Close
    it to end its workers and threads.

    Raises DataError where the cache limit cannot hold what the steps in flight need, and `beside`
    bytes that are in use for other purposes; NodeError where this machine is at fault.
    """
    workers, prefetch = settings.loader_workers, settings.prefetch
    # The main processes are within a step of each other. Ahead of them are the steps that workers
    # keep ready; behind them each worker may still hold what its last step used.
    in_flight = global_batch * (1 + workers * (prefetch + 1))
    sizes = data.shards.remote_sizes
    need = working_set(sampler, sizes, in_flight + global_batch, *part.on_node())
    check_limit(data.shards, need + beside)

    # Ready, being made, and two in the reader's hands: of each worker, for each micro-batch.
    ready = (prefetch if workers else 0) + 3
    shared = SharedBatches(
        max(workers, 1),
        ready * part.accumulation,
        _slot_size(data, batch, part.largest(sampler, global_batch)),
        shared=workers > 0,
    )
    maker = _StepBatches(
        data, sampler, batch, part, settings.fetch_threads, in_flight, total, shared
    )
    steps = sampler.steps_ahead(state, global_batch, total)
    made = _in_workers(maker, steps, settings) if workers else map(maker.__getitem__, steps)
    return _read(made, data, shared)


def _in_workers(
    maker: _StepBatches, steps: Iterator[Step], settings: LoaderSettings
) -> Iterator[_Made]:
    make_home()
    # How long torch waits for a batch before it looks whether a worker is dead: 5 s by default.
    vars(_MultiProcessingDataLoaderIter)["_try_get_data"].__defaults__ = (_LOOK_S,)
    context = multiprocessing.get_context(settings.loader_start)
    if settings.loader_start == "forkserver":
        # Workers share the pages of what the server that they are forked from has imported.
        context.set_forkserver_preload(["trainer.data.preload"])
    loader = DataLoader(
        maker,
        batch_size=None,
        sampler=_Once(steps),
        num_workers=settings.loader_workers,
        prefetch_factor=settings.prefetch,
        multiprocessing_context=context,
        worker_init_fn=_begin_worker,
    )
    before = multiprocessing.active_children()
    # The process that they work for decides when they end.
    with without_signals(*STOP_SIGNALS):
        made = iter(loader)
    return _ended(made, [p for p in multiprocessing.active_children() if p not in before])


def _ended(made: Iterator[_Made], workers: list[BaseProcess]) -> Iterator[_Made]:
    """What the workers make; then they are ended."""
    # multiprocessing waits for them where nobody has ended them; they do not hear its SIGTERM.
    end = Finalize(None, _kill, (workers,), exitpriority=0)
    try:
        yield from made
    finally:
        del made  # which asks them to end, and waits for some seconds
        end()


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def largest_slice(sampler: Sampler, count: int, world: int) -> int:
    """Pairs of a rank's slice of a step of `count`, hardly ever more."""
    lanes = sampler.settings.lanes
    if lanes == 1:
        return -(-count // world)
    # Of each lane's part, that of the rank with most lanes, or of fewest ranks that share one.
    part = -(-count // lanes)
    even = part * -(-lanes // world) if lanes >= world else -(-part // (world // lanes))
    # The lanes of many streams' pairs come together as chance has it, a visit at a time.
    return even + 2 * math.isqrt(even * sampler.settings.sentences_per_visit) + 2


def _slot_size(data: Dataset, batch: BatchSettings, pairs: int) -> int:
    """Bytes that a batch of so many pairs of distinct images takes, hardly ever more."""
    schema = data.manifest.schema
    features = schema.max_objects * FEATURES_OF[schema.feature_type].object_bytes(schema)
    swapped = int(features * min(1.0, 0.2 * batch.object_mask))
    small = schema.max_tokens * 40 + schema.max_objects * 80 + 256
    return pairs * (features + swapped + small) + (1 << 16)


def _read(
    steps: Iterator[_Made], data: Dataset, shared: SharedBatches
) -> Generator[Loaded, None, None]:
    pinned = torch.cuda.is_available()

    def unpacked(made: Packed | Batch) -> Batch:
        batch = shared.read(made) if isinstance(made, Packed) else made
        return batch.pin_memory() if pinned else batch

    try:
        for made in steps:
            if made.fault:
                kind, message = made.fault
                raise kind(message)
            yield Loaded(made.step, [unpacked(m) for m in made.batches], made.missing)
            del made  # the memory of its batches is used for the next
    finally:
        data.shards.stop()


def _begin_worker(_worker: int) -> None:
    # torch looks at the parent's id, which is the server's here: the two would keep each other
    # alive, and files in use.
    end_with_parent()


class _Once:
    """An iterator as the sampler that DataLoader wants."""

    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[Step]:
        return self._steps
