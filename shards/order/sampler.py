"""The multi-task sampler: which pairs a step trains on, and which of them get another sentence.

A sampler's state is a few integers. `steps_ahead` goes from a state through the steps to come, and
`plan` says which pairs a step takes. Both are pure, so any rank, loader worker or restart that
holds the state holds the future.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.order.apportionment import Shares, apportion, follow, next_taker
from shards.order.draws import I64, U64, chance, draw
from shards.order.epoch_order import EpochOrder, Span, Windows, epoch_order
from shards.order.keys import VERSION, arrange_key, match_key
from shards.order.modes import MODES
from shards.order.modes.base import Family
from shards.order.settings import SamplerSettings
from shards.order.streams import Contents, Stream, streams_of


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
    """Of its epoch."""
    lane: I64
    """Of its window."""
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


@dataclass(frozen=True)
class _Here:
    """The windows that steps of a family are in."""

    spans: tuple[list[Span], ...]
    """By stream of the family."""
    windows: Windows
    first: I64
    """Number of the first window of each stream of the sampler."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """The settings of a run's order and the streams that follow from them.

    What comes when of the shards: lookahead.py.
    """

    settings: SamplerSettings
    seed: int
    families: tuple[Family, ...]
    streams: tuple[Stream, ...]
    version: int = VERSION
    """Of the order (keys.py)."""
    _orders: dict[tuple[int, int], EpochOrder] = field(default_factory=dict, repr=False)
    """By (stream, epoch): those used last, two for each stream."""
    _here: dict[int, _Here] = field(default_factory=dict, repr=False)
    """By family."""

    def __reduce__(self) -> Any:
        return Sampler, (self.settings, self.seed, self.families, self.streams, self.version)

    def start(self) -> SamplerState:
        zeros = (0,) * len(self.streams)
        return SamplerState(0, zeros, zeros, (0,) * (1 + max(s.family for s in self.streams)))

    def order(self, stream: int, epoch: int) -> EpochOrder:
        """The order of one epoch of a stream, by its number. Threads may ask at one time."""
        found = self._orders.pop((stream, epoch), None)
        if found is None:
            found = self.new_order(stream, epoch)
        self._orders[stream, epoch] = found
        for old in list(self._orders)[: -2 * len(self.streams)]:
            self._orders.pop(old, None)
        return found

    def new_order(self, stream: int, epoch: int) -> EpochOrder:
        """The same, which is not kept for the next time."""
        of, settings = self.streams[stream], self.settings
        return epoch_order(
            of.sizes,
            self.seed,
            epoch,
            settings.window,
            of.key,
            settings.sentences_per_visit,
            settings.lanes,
            self.version,
            of.shards,
        )

    def neighbourhood(self, stream: int, epoch: int, window: int, lane: int) -> I64:
        """The shards that a lane of a window has pairs of."""
        return self.order(stream, epoch).lane_shards(window, lane, lane + 1)

    @cached_property
    def rates(self) -> tuple[float, ...]:
        """Pairs of each stream per pair consumed, in the long run."""
        return tuple(float(s.share * self.families[s.family].share) for s in self.streams)

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
        chosen, shares = self._of_family[family]
        cursors = [state.cursors[i] for i in chosen]
        takes = apportion(shares, cursors, count) if len(chosen) > 1 else (count,)
        if self.families[family].mismatch != "exact":
            return _Takes(chosen, takes, (0,) * len(chosen))
        before = [state.mismatched[i] for i in chosen]
        share = Fraction(str(self.settings.mismatch))
        two = Shares.of((share, 1 - share))
        bad = apportion(two, (sum(before), sum(cursors) - sum(before)), count)[0]
        after = [c + t for c, t in zip(cursors, takes, strict=True)]
        return _Takes(chosen, takes, follow(share, after, before, bad, takes))

    @cached_property
    def _of_family(self) -> list[tuple[list[int], Shares]]:
        """Of each family the streams, and their shares of its pairs."""
        out = []
        for family in range(len(self.families)):
            chosen = [i for i, s in enumerate(self.streams) if s.family == family]
            out.append((chosen, Shares.of([self.streams[i].share for i in chosen])))
        return out

    # --- pairs ----------------------------------------------------------------------------------

    def plan(self, step: Step) -> Plan:
        """All pairs of a step."""
        return self.slice(step, 0, 1)

    def slice(self, step: Step, rank: int, world: int) -> Plan:
        """The pairs of a step that one of `world` ranks trains on, in the step's order: those of
        its lanes. A rank has neighbouring lanes, with all of their pairs where there are as many
        lanes as ranks, and else an even part of these."""
        state, takes = step.before, self._takes(step.before, step.count)
        number = self._family(state)
        family, here = self.families[number], self._windows(number, state, takes)
        if len(takes.streams) == 1 and family.mismatch == "coin":
            stream_of = np.full(step.count, takes.streams[0])
            position = state.cursors[takes.streams[0]] + np.arange(step.count)
            mismatched = np.zeros(step.count, dtype=bool)
        else:
            stream_of, position, mismatched = self._arrange(state, takes)
        windows, which = here.windows, here.first[stream_of]
        while (beyond := position >= windows.end[which]).any():
            which = which + beyond
        local = position - windows.begin[which]
        offset = np.arange(step.count)
        if world > 1:
            offset = self._of_rank(windows.lane_of(which, local), rank, world)
            stream_of, which, local = stream_of[offset], which[offset], local[offset]
            mismatched = mismatched[offset]
        shard, index, lane = windows.locate(which, local)
        epoch = windows.epoch[which]
        if family.mismatch == "coin":
            draws = draw(self._match_keys[stream_of], epoch, shard, index)
            mismatched = chance(draws, self.settings.mismatch)
        return Plan(
            stream=stream_of,
            dataset=self._dataset_of[stream_of],
            epoch=epoch,
            shard=shard,
            index=index,
            mismatched=mismatched,
            offset=offset,
            window=windows.window[which],
            lane=lane,
            masks=family.masks,
        )

    def lanes_of(self, rank: int, world: int) -> tuple[int, int]:
        """The lanes that a rank takes pairs of: [first, last)."""
        lanes = self.settings.lanes
        if lanes < world:
            return rank * lanes // world, rank * lanes // world + 1
        return lanes * rank // world, lanes * (rank + 1) // world

    def _of_rank(self, lane: I64, rank: int, world: int) -> I64:
        """Which of a step's pairs, of these lanes, are a rank's."""
        first, last = self.lanes_of(rank, world)
        rows = np.flatnonzero((lane >= first) & (lane < last))
        lanes = self.settings.lanes
        if lanes >= world:
            return rows
        # The ranks that share the lane: those r with r * lanes // world == first.
        begin, end = -(-first * world // lanes), -(-last * world // lanes)
        part, parts = rank - begin, end - begin
        return rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]

    def _windows(self, family: int, state: SamplerState, takes: _Takes) -> _Here:
        """The windows of a step's pairs; those of the step before, where they are the same."""
        here = self._here.get(family)
        before = here.spans if here else ([],) * len(takes.streams)
        spans = []
        for stream, old, pairs in zip(takes.streams, before, takes.pairs, strict=True):
            begin = state.cursors[stream]
            if not old or begin < old[0].begin or old[-1].end < begin + pairs:
                old, here = self._spans(stream, begin, begin + pairs), None
            spans.append(old)
        if here is None:
            first = np.zeros(len(self.streams), dtype=np.int64)
            first[list(takes.streams)] = np.cumsum([0, *map(len, spans[:-1])])
            here = _Here(tuple(spans), Windows(list(chain.from_iterable(spans))), first)
            self._here[family] = here
        return here

    def _spans(self, stream: int, begin: int, end: int) -> list[Span]:
        """The windows of a stream's positions [begin, end), one at least."""
        out = []
        pairs = self.streams[stream].pairs
        while True:
            epoch, position = divmod(begin, pairs)
            order = self.order(stream, epoch)
            window = order.window_of(position)
            first = epoch * pairs + order.begin(window)
            out.append(Span(order, window, stream, epoch, first))
            begin = epoch * pairs + order.begin(window + 1)
            if begin >= end:
                return out

    @cached_property
    def _match_keys(self) -> U64:
        """Of each stream's coins: whether a pair is mismatched, no other pair and no batch
        decides."""
        keys = [match_key(self.version, self.seed, s.key) for s in self.streams]
        return np.asarray(keys, dtype=np.uint64)

    @cached_property
    def _dataset_of(self) -> I64:
        return np.asarray([s.dataset for s in self.streams], dtype=np.int64)

    def _arrange(self, state: SamplerState, takes: _Takes) -> tuple[I64, I64, NDArray[np.bool_]]:
        """How a step mixes its streams: for each of its pairs the stream, the position in it, and
        whether the pair is mismatched."""
        key = arrange_key(self.version, self.seed, state.consumed)
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
        order = np.argsort(draw(key, every, 1), kind="stable")
        which = np.searchsorted(ends, order, side="right")
        starts = np.asarray([state.cursors[i] for i in takes.streams]) - (ends - pairs)
        return np.asarray(takes.streams)[which], starts[which] + order, mismatched[order]


def make_sampler(
    settings: SamplerSettings, seed: int, contents: Contents, version: int = VERSION
) -> Sampler:
    """The sampler of a data set. Raises DataError where the settings ask for pairs that there are
    none of."""
    families = MODES[settings.mode](settings)
    return Sampler(settings, seed, families, streams_of(settings, families, contents), version)
