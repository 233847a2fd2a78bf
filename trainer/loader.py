"""The batches of the steps to come, in order, made in this process or ahead of it in workers.

A step is (sampler state, number of pairs): whoever holds it makes this rank's micro-batches, so
any number of loader workers gives the same stream and there is nothing of theirs to save.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from model.batch import Batch
from shards.dataset import Dataset, open_dataset
from shards.sampler import SamplerSettings, SamplerState, Stream, advance, plan
from trainer.batch import BatchSettings, make_batch


@dataclass(frozen=True)
class Step:
    """before: sampler state at the step's start; count: pairs of the step over all ranks."""

    before: SamplerState
    count: int


@dataclass(frozen=True)
class Share:
    """Which part of every step is made here: rank of world, in micro-batches."""

    rank: int
    world: int
    accumulation: int


def steps_ahead(
    settings: SamplerSettings, state: SamplerState, global_batch: int, total: int
) -> Iterator[Step]:
    """The steps from `state` until `total` pairs are consumed; the last one may be short."""
    while state.consumed < total:
        count = min(global_batch, total - state.consumed)
        yield Step(state, count)
        state = advance(settings, state, count)


def bounds(count: int, part: int, parts: int) -> tuple[int, int]:
    """The part-th of `parts` slices of `count` things; sizes differ by at most one."""
    return count * part // parts, count * (part + 1) // parts


@dataclass
class _StepBatches(TorchDataset[list[Batch]]):
    """Maps a step to this rank's micro-batches."""

    data: Dataset
    sampler: SamplerSettings
    streams: tuple[Stream, ...]
    batch: BatchSettings
    share: Share

    def __getitem__(self, step: Step) -> list[Batch]:
        whole = plan(self.sampler, self.streams, step.before, step.count)
        begin, end = bounds(step.count, self.share.rank, self.share.world)
        own = whole.slice(begin, end)
        slices = (
            own.slice(*bounds(len(own), i, self.share.accumulation))
            for i in range(self.share.accumulation)
        )
        return [make_batch(self.data, self.streams, s, self.batch) for s in slices]

    def __getstate__(self) -> dict[str, Any]:
        # A worker maps the files itself: only names travel.
        return {**self.__dict__, "data": (self.data.url, self.data.cache)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"data": open_dataset(*state["data"])})


def load_steps(
    data: Dataset,
    sampler: SamplerSettings,
    streams: tuple[Stream, ...],
    batch: BatchSettings,
    share: Share,
    steps: Iterator[Step],
    workers: int,
    prefetch: int,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each of `steps`, in order, with `workers` processes ahead."""
    loader = DataLoader(
        _StepBatches(data, sampler, streams, batch, share),
        batch_size=None,
        sampler=_Once(steps),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


class _Once:
    """An iterator as the sampler that DataLoader wants."""

    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[Step]:
        return self._steps
