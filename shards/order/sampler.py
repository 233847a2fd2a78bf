"""The multi-task sampler: which pairs a step trains on, and which of them get another sentence.

A sampler's state is a few integers. `steps_ahead` goes from a state through the steps to come, and
`plan` says which pairs a step takes. Both are pure, so any rank, loader worker or restart that
holds the state holds the future.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shards.order.apportionment import apportion, follow, next_taker
from shards.order.draws import I64, chance, draw, fold
from shards.order.modes import MODES
from shards.order.modes.base import Family
from shards.order.permutation import EpochOrder, epoch_order
from shards.order.settings import SamplerSettings
from shards.order.streams import Contents, Stream, streams_of

# Purposes of draws: part of every key, so that no two uses of a pair's randomness coincide.
PURPOSE_MATCH, PURPOSE_ARRANGE = 1, 2


@dataclass(frozen=True)
class SamplerState:
    """The whole data state. Its fields are part of the checkpoints' format."""

    consumed: int
    """Pairs taken since the run began."""
    cursors: tuple[int, ...]
    """Pairs taken from each stream."""
    mismatched: tuple[int, ...]
    """Pairs of each stream that got another sentence by an exact share, not by a coin."""
    steps: tuple[int, ...]
    """Steps of each family."""
    skipped: tuple[tuple[int, int], ...] = ()
    """(shard, consumed when it was given up) under data.on_error=skip."""
    skipped_pairs: int = 0
    """Positions that were passed over for it."""

    @property
    def skipped_shards(self) -> list[int]:
        return [shard for shard, _ in self.skipped]


@dataclass(frozen=True)
class Step:
    """One optimizer step, before anything of it is looked at."""

    before: SamplerState
    count: int
    """Pairs over all ranks."""
    family: str
    """Which objectives it serves: a family's name, or "all"."""
    after: SamplerState


@dataclass(frozen=True)
class Plan:
    """The pairs of a step, or a slice of them, in order; every array has one element a pair."""

    stream: I64
    """Number of its stream."""
    dataset: I64
    """Number of its data set."""
    epoch: I64
    """The stream's own epoch."""
    shard: I64
    index: I64
    """It is the index-th pair of its stream in its shard."""
    mismatched: NDArray[np.bool_]
    """Gets another image's sentence."""
    offset: I64
    """Its place in the step."""
    window: I64
    lane: I64
    masks: bool = True
    """Whether words and objects of the step are masked."""

    def __len__(self) -> int:
        return len(self.stream)

    def take(self, rows: slice | I64) -> Plan:
        return Plan(
            self.stream[rows],
            self.dataset[rows],
            self.epoch[rows],
            self.shard[rows],
            self.index[rows],
            self.mismatched[rows],
            self.offset[rows],
            self.window[rows],
            self.lane[rows],
            self.masks,
        )

    def without(self, shards: Sequence[int]) -> Plan:
        """The plan less the pairs of some shards."""
        if not shards:
            return self
        return self.take(np.flatnonzero(~np.isin(self.shard, np.asarray(shards))))


@dataclass(frozen=True)
class _Takes:
    """What a step takes from each stream of its family."""

    streams: list[int]
    pairs: tuple[int, ...]
    mismatched: tuple[int, ...]
    """How many of them, where that is exact."""


@lru_cache(maxsize=16)
def _stream_epoch(stream: Stream, seed: int, epoch: int, window: int, k: int) -> EpochOrder:
    return epoch_order(stream.sizes, seed, epoch, window, stream.key, k)


@dataclass(frozen=True, eq=False)
class Sampler:
    """The settings of a run's order and the streams that follow from them.

    What comes when of the shards: lookahead.py.
    """

    settings: SamplerSettings
    seed: int
    families: tuple[Family, ...]
    streams: tuple[Stream, ...]

    def start(self) -> SamplerState:
        zeros = (0,) * len(self.streams)
        return SamplerState(0, zeros, zeros, (0,) * (1 + max(s.family for s in self.streams)))

    def order(self, stream: Stream, epoch: int) -> EpochOrder:
        """The order of one epoch of a stream."""
        visit = self.settings.sentences_per_visit
        return _stream_epoch(stream, self.seed, epoch, self.settings.window, visit)

    def rates(self) -> list[float]:
        """Pairs of each stream per pair consumed, in the long run."""
        return [float(s.share * self.families[s.family].share) for s in self.streams]

    # --- steps ----------------------------------------------------------------------------------

    def steps_ahead(self, state: SamplerState, global_batch: int, total: int) -> Iterator[Step]:
        """The steps from `state` until `total` pairs are consumed."""
        while state.consumed < total:
            step = self.step(state, self._count(state, global_batch, total))
            yield step
            state = step.after

    def step(self, state: SamplerState, count: int) -> Step:
        """The step of `count` pairs after `state`."""
        takes, family = self._takes(state, count), self._family(state)
        cursors, mismatched, steps = map(list, (state.cursors, state.mismatched, state.steps))
        for i, pairs, bad in zip(takes.streams, takes.pairs, takes.mismatched, strict=True):
            cursors[i] += pairs
            mismatched[i] += bad
        steps[family] += 1
        after = replace(
            state,
            consumed=state.consumed + count,
            cursors=tuple(cursors),
            mismatched=tuple(mismatched),
            steps=tuple(steps),
        )
        return Step(state, count, self.families[family].name, after)

    def _count(self, state: SamplerState, global_batch: int, total: int) -> int:
        """Pairs of the next step, of a run of `total` pairs."""
        count = min(global_batch, total - state.consumed)
        if self.settings.last_batch == "short":
            epoch = self.streams[0].pairs
            count = min(count, epoch - state.consumed % epoch)
        return count

    def _family(self, state: SamplerState) -> int:
        """Number of the family that the next step serves."""
        return next_taker([family.share for family in self.families], state.steps)

    def _takes(self, state: SamplerState, count: int) -> _Takes:
        """What the next step of `count` pairs takes from each stream of its family."""
        family = self._family(state)
        chosen = [i for i, s in enumerate(self.streams) if s.family == family]
        cursors = [state.cursors[i] for i in chosen]
        shares = [self.streams[i].share for i in chosen]
        takes = apportion(shares, cursors, count) if len(chosen) > 1 else (count,)
        if self.families[family].mismatch != "exact":
            return _Takes(chosen, takes, (0,) * len(chosen))
        before = [state.mismatched[i] for i in chosen]
        share = Fraction(str(self.settings.mismatch))
        bad = apportion((share, 1 - share), (sum(before), sum(cursors) - sum(before)), count)[0]
        targets = [share * (c + t) for c, t in zip(cursors, takes, strict=True)]
        return _Takes(chosen, takes, follow(targets, before, bad, takes))

    # --- pairs ----------------------------------------------------------------------------------

    def plan(self, step: Step, begin: int = 0, end: int | None = None) -> Plan:
        """Pairs [begin, end) of a step."""
        end = step.count if end is None else end
        state, takes = step.before, self._takes(step.before, step.count)
        family, offset = self.families[self._family(state)], np.arange(begin, end)
        if len(takes.streams) == 1 and family.mismatch == "coin":
            (only,) = takes.streams
            stream_of = np.full(end - begin, only)
            position = state.cursors[only] + offset
            mismatched = np.zeros(end - begin, dtype=bool)
        else:
            stream_of, position, mismatched = self._arrange(state, takes, begin, end)
        epoch, shard, index = (np.empty(end - begin, dtype=np.int64) for _ in range(3))
        for i in takes.streams:
            rows = np.flatnonzero(stream_of == i) if len(takes.streams) > 1 else slice(None)
            found = self._locate(self.streams[i], position[rows])
            epoch[rows], shard[rows], index[rows] = found
            if family.mismatch == "coin":
                mismatched[rows] = self._coin(self.streams[i], *found)
        dataset = np.asarray([s.dataset for s in self.streams])[stream_of]
        window = np.zeros_like(epoch)
        for i, e in set(zip(stream_of.tolist(), epoch.tolist())):
            rows = (stream_of == i) & (epoch == e)
            o = self.order(self.streams[i], e)
            inverse = np.zeros(int(o.shard_order.max()) + 1, dtype=np.int64)
            inverse[o.shard_order] = np.arange(len(o.shard_order))
            window[rows] = inverse[shard[rows]] // o.window
        lane = np.zeros_like(epoch)
        return Plan(
            stream_of, dataset, epoch, shard, index, mismatched, offset, window, lane, family.masks
        )

    def neighbourhood(self, stream: int, epoch: int, window: int, lane: int) -> I64:
        order = self.order(self.streams[stream], epoch)
        return order.shard_order[window * order.window : (window + 1) * order.window]

    def _arrange(
        self, state: SamplerState, takes: _Takes, begin: int, end: int
    ) -> tuple[I64, I64, NDArray[np.bool_]]:
        """How a step mixes its streams: for its pairs [begin, end) the stream, the position in
        it, and whether the pair is mismatched."""
        key = fold(self.seed, state.consumed, PURPOSE_ARRANGE)
        # The step's pairs, counted through its streams: `ends` is where each stream's pairs end.
        pairs = np.asarray(takes.pairs, dtype=np.int64)
        ends, every = np.cumsum(pairs), np.arange(sum(takes.pairs))
        rank = draw(key, every)
        mismatched = np.zeros(len(every), dtype=bool)
        for last, count, bad in zip(ends.tolist(), takes.pairs, takes.mismatched, strict=True):
            # Those whose draw is lowest; the order of a stream is random already.
            if bad:
                first = last - count
                mismatched[first + np.argsort(rank[first:last], kind="stable")[:bad]] = True
        order = np.argsort(draw(key, every, 1), kind="stable")[begin:end]
        which = np.searchsorted(ends, order, side="right")
        starts = np.asarray([state.cursors[i] for i in takes.streams]) - (ends - pairs)
        return np.asarray(takes.streams)[which], starts[which] + order, mismatched[order]

    def _locate(self, stream: Stream, position: I64) -> tuple[I64, I64, I64]:
        """Positions of a stream -> (epoch, shard, index)."""
        epoch = position // stream.pairs
        first = int(epoch.min(initial=0)) if len(epoch) else 0
        last = int(epoch.max(initial=0))
        shard, index = np.empty_like(position), np.empty_like(position)
        for e in range(first, last + 1):
            rows = slice(None) if first == last else np.flatnonzero(epoch == e)
            order = self.order(stream, e)
            shard[rows], index[rows] = order.locate(position[rows] - e * stream.pairs)
        return epoch, shard, index

    def _coin(self, stream: Stream, epoch: I64, shard: I64, index: I64) -> NDArray[np.bool_]:
        """Whether a pair is mismatched, which no other pair and no batch decides."""
        key = fold(self.seed, stream.key, PURPOSE_MATCH)
        return chance(draw(key, epoch, shard, index), self.settings.mismatch)


def make_sampler(settings: SamplerSettings, seed: int, contents: Contents) -> Sampler:
    """The sampler of a data set. Raises DataError where the settings ask for pairs that there are
    none of."""
    families = MODES[settings.mode](settings)
    return Sampler(settings, seed, families, streams_of(settings, families, contents))
