"""The multi-task sampler: which pairs a step trains on, and which of them get another sentence.

A sampler state is a few integers; `plan` maps (state, number of pairs) to the next pairs and
`advance` to the state after them. Both are pure, so any rank, loader worker or restart that holds
the state holds the future. What the modes are, and their streams: shards/order/streams.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.order.apportionment import apportion, follow, next_taker, shares_of
from shards.order.draws import I64, chance, draw, fold
from shards.order.permutation import EpochOrder, epoch_order
from shards.order.streams import FAMILIES, SamplerSettings, Stream

# Purposes of draws: part of every key, so that no two uses of a pair's randomness coincide.
PURPOSE_MATCH, PURPOSE_ARRANGE = 1, 2


@dataclass(frozen=True)
class SamplerState:
    """The whole data state.

    consumed: pairs taken since the run began; cursors: pairs taken from each stream; mismatched:
    how many of them exactly (not by a coin) got another sentence; steps: steps of each family;
    skipped: (shard, consumed when it was given up) under on_error=skip; skipped_pairs: positions
    that were passed over for it.
    """

    consumed: int
    cursors: tuple[int, ...]
    mismatched: tuple[int, ...]
    steps: tuple[int, ...]
    skipped: tuple[tuple[int, int], ...] = ()
    skipped_pairs: int = 0

    def to_json(self) -> dict[str, Any]:
        lists = {k: list(getattr(self, k)) for k in ("cursors", "mismatched", "steps")}
        return {
            "consumed": self.consumed,
            **lists,
            "skipped": [list(entry) for entry in self.skipped],
            "skipped_pairs": self.skipped_pairs,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> SamplerState:
        def numbers(key: str) -> tuple[int, ...]:
            return tuple(int(n) for n in data[key])

        return SamplerState(
            int(data["consumed"]),
            numbers("cursors"),
            numbers("mismatched"),
            numbers("steps"),
            tuple((int(s), int(c)) for s, c in data["skipped"]),
            int(data["skipped_pairs"]),
        )


@dataclass(frozen=True)
class Plan:
    """The pairs of one step, or a slice of them, in order; every array has one element a pair.

    stream: index into the streams; epoch: the stream's own epoch; shard and index: the pair as
    the index-th pair of its stream in that shard; mismatched: gets another image's sentence.
    slot: its place in the step. masks: whether words and objects are masked.
    """

    stream: I64
    epoch: I64
    shard: I64
    index: I64
    mismatched: NDArray[np.bool_]
    slot: I64
    masks: bool = True

    def __len__(self) -> int:
        return len(self.stream)

    def take(self, rows: slice | I64) -> Plan:
        return Plan(
            self.stream[rows],
            self.epoch[rows],
            self.shard[rows],
            self.index[rows],
            self.mismatched[rows],
            self.slot[rows],
            self.masks,
        )

    def without(self, shards: Sequence[int]) -> Plan:
        """The plan less the pairs of some shards."""
        if not shards:
            return self
        return self.take(np.flatnonzero(~np.isin(self.shard, np.asarray(shards))))


def start_state(streams: Sequence[Stream]) -> SamplerState:
    zeros = (0,) * len(streams)
    return SamplerState(0, zeros, zeros, (0,) * (1 + max(s.family for s in streams)))


# --- state and plan -----------------------------------------------------------------------------


def family_of(settings: SamplerSettings, state: SamplerState) -> str:
    """Which objectives the next step serves: `all`, or one of FAMILIES."""
    return "all" if settings.mode != "alternating" else FAMILIES[_family(settings, state)]


def _family(settings: SamplerSettings, state: SamplerState) -> int:
    if settings.mode != "alternating":
        return 0
    return next_taker(shares_of(settings.families), state.steps)


def next_count(
    settings: SamplerSettings,
    streams: Sequence[Stream],
    state: SamplerState,
    global_batch: int,
    total: int,
) -> int:
    """Pairs of the next step, of a run of `total` pairs."""
    count = min(global_batch, total - state.consumed)
    if settings.last_batch == "short":
        count = min(count, streams[0].pairs - state.consumed % streams[0].pairs)
    return count


def _takes(
    settings: SamplerSettings, streams: Sequence[Stream], state: SamplerState, count: int
) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """The next step's streams, how many of its pairs come from each, and how many of those are
    mismatched (where that is exact)."""
    family = _family(settings, state)
    chosen = [i for i, s in enumerate(streams) if s.family == family]
    cursors = [state.cursors[i] for i in chosen]
    shares = [streams[i].share for i in chosen]
    takes = apportion(shares, cursors, count) if len(chosen) > 1 else (count,)
    if settings.mode == "natural" or (
        settings.mode == "alternating" and FAMILIES[family] != "matching"
    ):
        return chosen, takes, (0,) * len(chosen)
    before = [state.mismatched[i] for i in chosen]
    share = Fraction(str(settings.mismatch))
    bad = apportion((share, 1 - share), (sum(before), sum(cursors) - sum(before)), count)[0]
    targets = [share * (c + t) for c, t in zip(cursors, takes, strict=True)]
    return chosen, takes, follow(targets, before, bad, takes)


def advance(
    settings: SamplerSettings, streams: Sequence[Stream], state: SamplerState, count: int
) -> SamplerState:
    """The state after a step of `count` pairs."""
    cursors, mismatched = list(state.cursors), list(state.mismatched)
    for i, take, bad in zip(*_takes(settings, streams, state, count), strict=True):
        cursors[i] += take
        mismatched[i] += bad
    steps = list(state.steps)
    steps[_family(settings, state)] += 1
    return replace(
        state,
        consumed=state.consumed + count,
        cursors=tuple(cursors),
        mismatched=tuple(mismatched),
        steps=tuple(steps),
    )


@lru_cache(maxsize=16)
def stream_epoch(stream: Stream, seed: int, epoch: int, window: int, k: int) -> EpochOrder:
    """The order of one epoch of a stream."""
    return epoch_order(stream.sizes, seed, epoch, window, stream.key, k)


def plan(
    settings: SamplerSettings,
    streams: Sequence[Stream],
    state: SamplerState,
    count: int,
    begin: int = 0,
    end: int | None = None,
) -> Plan:
    """Pairs [begin, end) of the step of `count` pairs after `state`."""
    end = count if end is None else end
    chosen, takes, bad = _takes(settings, streams, state, count)
    slot = np.arange(begin, end)
    if len(chosen) == 1 and settings.mode == "natural":
        stream_of = np.full(end - begin, chosen[0])
        position = state.cursors[chosen[0]] + slot
        mismatched = np.zeros(end - begin, dtype=bool)
    else:
        order, ends, mismatched = _arrange(settings, state, takes, bad)
        order = order[begin:end]
        which = np.searchsorted(ends, order, side="right")
        starts = np.asarray([state.cursors[i] for i in chosen]) - (ends - np.asarray(takes))
        stream_of, position = np.asarray(chosen)[which], starts[which] + order
        mismatched = mismatched[order]
    epoch, shard, index = (np.empty(end - begin, dtype=np.int64) for _ in range(3))
    for i in chosen:
        rows = np.flatnonzero(stream_of == i) if len(chosen) > 1 else slice(None)
        found = _locate(settings, streams[i], position[rows])
        epoch[rows], shard[rows], index[rows] = found
        if settings.mode == "natural":
            mismatched[rows] = _coin(settings, streams[i], *found)
    family = _family(settings, state)
    masks = settings.mode != "alternating" or FAMILIES[family] == "masked"
    return Plan(stream_of, epoch, shard, index, mismatched, slot, masks)


def _locate(settings: SamplerSettings, stream: Stream, position: I64) -> tuple[I64, I64, I64]:
    """Positions of a stream -> (epoch, shard, index)."""
    arguments = settings.window, settings.sentences_per_visit
    epoch = position // stream.pairs
    first = int(epoch.min(initial=0)) if len(epoch) else 0
    last = int(epoch.max(initial=0))
    shard, index = np.empty_like(position), np.empty_like(position)
    for e in range(first, last + 1):
        rows = slice(None) if first == last else np.flatnonzero(epoch == e)
        order = stream_epoch(stream, settings.seed, e, *arguments)
        shard[rows], index[rows] = order.locate(position[rows] - e * stream.pairs)
    return epoch, shard, index


def _coin(
    settings: SamplerSettings, stream: Stream, epoch: I64, shard: I64, index: I64
) -> NDArray[np.bool_]:
    """natural: whether a pair is mismatched, which no other pair and no batch decides."""
    key = fold(settings.seed, stream.key, PURPOSE_MATCH)
    return chance(draw(key, epoch, shard, index), settings.mismatch)


def _arrange(
    settings: SamplerSettings, state: SamplerState, takes: Sequence[int], bad: Sequence[int]
) -> tuple[I64, I64, NDArray[np.bool_]]:
    """How a step mixes its streams: which pair (counted through the streams) is in each slot, the
    end of each stream's pairs in that count, and which pairs are mismatched."""
    count = sum(takes)
    key = fold(settings.seed, state.consumed, PURPOSE_ARRANGE)
    ends = np.cumsum(np.asarray(takes, dtype=np.int64))
    rank = draw(key, np.arange(count))
    mismatched = np.zeros(count, dtype=bool)
    for end, take, chosen in zip(ends.tolist(), takes, bad, strict=True):
        # Those whose draw is lowest; the order of a stream is random already.
        if chosen:
            begin = end - take
            mismatched[begin + np.argsort(rank[begin:end], kind="stable")[:chosen]] = True
    order = np.argsort(draw(key, np.arange(count), 1), kind="stable")
    return order, ends, mismatched


def steps_ahead(
    settings: SamplerSettings,
    streams: Sequence[Stream],
    state: SamplerState,
    global_batch: int,
    total: int,
) -> Iterator[tuple[SamplerState, int]]:
    """(state before, number of pairs) of the steps until `total` pairs are consumed."""
    while state.consumed < total:
        count = next_count(settings, streams, state, global_batch, total)
        yield state, count
        state = advance(settings, streams, state, count)
