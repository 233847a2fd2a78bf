"""The order of an epoch as a pure function: (seed, epoch, position) -> pair.

An epoch permutes the shards and cuts them into windows of W shards. The pairs of a window, as they
lie in its shards, are divided into V lanes of equal size (±1), and each lane is walked through a
bijective permutation of its pairs, or of its visits: runs of k neighbouring pairs. Positions take
from all lanes in turn. Nothing of the size of the data set is ever built: an epoch's order holds a
few integers per shard, and a position costs O(log shards).

With one lane, visits are of one shard, and its pairs that fill none are put together to visits of
their own. With more, visits are cut from the window's pairs as they lie, so that a visit is of two
shards at most and every lane keeps to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from shards.order.draws import I64, draw
from shards.order.keys import (
    VERSION,
    epoch_key,
    lane_keys,
    loose_key,
    shards_key,
    turn_key,
    window_key,
)
from shards.order.permutation import SMALL, Bijections, permute


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """One epoch's order over shards of given sizes."""

    shard_order: NDArray[np.int32]
    """Shard at each place of the epoch, (places,); shards without pairs have none."""
    start: I64
    """Pairs before each place, (places + 1,)."""
    window: int
    """Shards per window."""
    k: int
    """Pairs per visit."""
    lanes: int
    key: int
    """Folded from seed, epoch and stream."""
    version: int
    """Of the order (keys.py)."""
    _last: dict[tuple[int, int], Windows] = field(default_factory=dict, repr=False)
    """The windows that `locate` was asked for last."""

    @property
    def pairs(self) -> int:
        return int(self.start[-1])

    @property
    def windows(self) -> int:
        return -(-len(self.shard_order) // self.window)

    def places(self, window: int) -> slice:
        """The places of a window."""
        return slice(window * self.window, min((window + 1) * self.window, len(self.shard_order)))

    def shards(self, window: int) -> I64:
        """The shards of a window, in order; none beyond the last one."""
        return self.shard_order[self.places(window)].astype(np.int64)

    def begin(self, window: int) -> int:
        """Pairs before a window, or before the end of the epoch."""
        return int(self.start[min(window * self.window, len(self.shard_order))])

    def window_start(self) -> I64:
        """Pairs before each window, i64 (windows + 1,)."""
        return np.append(self.start[: -1 : self.window], self.start[-1])

    def first_turn(self, window: int) -> int:
        """Which turn a window begins with. Another one in each window of each stream, or the
        streams of a step, which may begin together, would all take from the same few lanes."""
        return turn_key(self.key, window) % self.lanes

    def window_of(self, position: int) -> int:
        """The window of a position of the epoch."""
        return (int(np.searchsorted(self.start, position, side="right")) - 1) // self.window

    def lane_shards(self, window: int, first: int, last: int) -> I64:
        """The shards that lanes [first, last) of a window have pairs of, in order."""
        if self.lanes == 1:
            return self.shards(window)
        places = self.places(window)
        start = self.start[places.start : places.stop + 1] - self.start[places.start]
        pairs = int(start[-1])
        edges = lane_starts(pairs // self.k, self.lanes, self.first_turn(window)) * self.k
        edges[-1] = pairs  # the last visit may be short
        begin, end = int(edges[first]), int(edges[last])
        if begin == end:
            return np.zeros(0, dtype=np.int64)
        a = int(np.searchsorted(start, begin, side="right")) - 1
        b = int(np.searchsorted(start, end, side="left"))
        return self.shard_order[places.start + a : places.start + b].astype(np.int64)

    def with_nearest(self, shard: int, but: I64) -> I64:
        """A shard, and the one nearest to it in the epoch's order that is none of `but`."""
        place = int(np.flatnonzero(self.shard_order == shard)[0])
        near = np.argsort(np.abs(np.arange(len(self.shard_order)) - place), kind="stable")
        others = self.shard_order[near[1:]]
        others = others[~np.isin(others, but)]
        return np.append(shard, others[:1]).astype(np.int64)

    def locate(self, position: I64) -> tuple[I64, I64]:
        """Positions in the epoch -> (shard, index of the pair in that shard), each i64."""
        if not len(position):
            return position.copy(), position.copy()
        first = self.window_of(int(position.min()))
        last = self.window_of(int(position.max()))
        windows = self._last.get((first, last))
        if windows is None:
            spans = [Span(self, w, 0, 0, self.begin(w)) for w in range(first, last + 1)]
            windows = Windows(spans)
            self._last.clear()
            self._last[first, last] = windows
        which = np.searchsorted(windows.end, position, side="right")
        shard, index, _ = windows.locate(which, position - windows.begin[which])
        return shard, index


def epoch_order(
    sizes: I64,
    seed: int,
    epoch: int,
    window: int,
    stream: int = 0,
    k: int = 1,
    lanes: int = 1,
    version: int = VERSION,
    shards: NDArray[np.int32] | None = None,
) -> EpochOrder:
    """The order of `epoch` over shards with `sizes` pairs; window 0 = all shards; visits of k.
    shards: whose sizes these are, (n,), rising; 0, 1, 2, … where it is None."""
    key = epoch_key(version, seed, epoch, stream)
    at = np.flatnonzero(sizes)
    visited = at if shards is None else shards[at].astype(np.int64)
    turn = np.argsort(draw(shards_key(version, key), visited), kind="stable")
    shard_order = visited[turn]
    start = _before(np.asarray(sizes, dtype=np.int64)[at[turn]])
    every = window or max(len(visited), 1)
    return EpochOrder(shard_order.astype(np.int32), start, every, k, lanes, key, version)


# --- lanes --------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def lane_turns(lanes: int) -> I64:
    """The lane that each of `lanes` turns takes from. Neighbouring turns are far apart, so that any
    run of turns is spread evenly over the lanes (van der Corput's sequence)."""
    bits = max(lanes - 1, 1).bit_length()
    turn = np.arange(1 << bits)
    reversed_ = np.zeros_like(turn)
    for i in range(bits):
        reversed_ |= (turn >> i & 1) << (bits - 1 - i)
    found: I64 = reversed_[reversed_ < lanes]
    return found


@lru_cache(maxsize=16)
def _turn_of(lanes: int) -> I64:
    """The turn of each lane."""
    return np.argsort(lane_turns(lanes))


def lane_starts(visits: int, lanes: int, first: int) -> I64:
    """Visits before each lane, and all, where turn `first` begins: i64 (lanes + 1,)."""
    sizes = visits // lanes + ((_turn_of(lanes) - first) % lanes < visits % lanes)
    return np.concatenate([[0], np.cumsum(sizes)])


# --- windows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A window of an epoch of a stream."""

    order: EpochOrder
    window: int
    stream: int
    epoch: int
    begin: int
    """Its first position, counted as the caller counts."""

    @cached_property
    def end(self) -> int:
        return self.begin + int(self.sizes.sum())

    @cached_property
    def key(self) -> int:
        return window_key(self.order.version, self.order.key, self.window)

    @cached_property
    def shards(self) -> NDArray[np.int32]:
        return self.order.shard_order[self.order.places(self.window)]

    @cached_property
    def sizes(self) -> I64:
        """Pairs of each of its shards."""
        places = self.order.places(self.window)
        return np.diff(self.order.start[places.start : places.stop + 1])


class Windows:
    """Some windows, side by side: positions in them become pairs by vector operations, however many
    windows there are. All have the same k, lanes and version."""

    def __init__(self, spans: Sequence[Span]) -> None:
        order = spans[0].order
        self._k, self._lanes, self._version = order.k, order.lanes, order.version
        self._shard = np.concatenate([s.shards for s in spans])
        sizes = np.concatenate([s.sizes for s in spans])
        # Pairs before each place, counted through all the windows.
        self._start = _before(sizes)
        first = _before(np.asarray([len(s.shards) for s in spans]))
        self._base = self._start[first[:-1]]
        self.pairs = np.diff(self._start[first])
        """Of each window."""
        self.stream, self.epoch, self.window, self.begin = (
            np.asarray([getattr(s, name) for s in spans], dtype=np.int64)
            for name in ("stream", "epoch", "window", "begin")
        )
        self.end = self.begin + self.pairs
        keys = [s.order.key for s in spans]
        self._epoch_key = np.asarray(keys, dtype=np.uint64)
        if self._lanes > 1:
            turns = [s.order.first_turn(s.window) for s in spans]
            counts = (self.pairs // self._k).tolist()
            each = zip(counts, turns, strict=True)
            self._lane_start = np.stack([lane_starts(n, self._lanes, turn) for n, turn in each])
            self._first_turn = np.asarray(turns, dtype=np.int64)
            return
        window_keys = np.asarray([s.key for s in spans], dtype=np.uint64)
        small = SMALL if self._version > 2 else 0
        if self._k == 1:
            self._shuffle = Bijections(self.pairs, window_keys, small)
        else:
            self._visits = _before(sizes // self._k)
            self._rest = _before(sizes % self._k)
            self._visits_first = self._visits[first]
            self._rest_first = self._rest[first]
            loose = np.diff(self._rest_first)
            units = np.diff(self._visits_first) + loose // self._k
            self._shuffle = Bijections(units, window_keys, small)
            of_loose = [loose_key(self._version, s.order.key, s.window) for s in spans]
            self._shuffle_loose = Bijections(loose, np.asarray(of_loose, dtype=np.uint64), small)

    def lane_of(self, which: I64, local: I64) -> I64:
        """The lane of each position; which: its window's number here; local: its position in it."""
        if self._lanes == 1:
            return np.zeros_like(local)
        visit = local // self._k
        lane = lane_turns(self._lanes)[(visit + self._first_turn[which]) % self._lanes]
        # A short visit at the window's end lies behind the last lane's.
        short = visit >= self.pairs[which] // self._k
        return np.where(short, self._lanes - 1, lane)

    def locate(self, which: I64, local: I64) -> tuple[I64, I64, I64]:
        """Positions, as for `lane_of` -> (shard, index of the pair in that shard, lane)."""
        if self._lanes > 1:
            at, lane = self._in_lanes(which, local)
        elif self._k > 1:
            return self._in_visits(which, local)
        else:
            at = self._shuffle.permute(local, which)
            lane = np.zeros_like(local)
        at = at + self._base[which]
        place = np.searchsorted(self._start, at, side="right") - 1
        return self._shard[place].astype(np.int64), at - self._start[place], lane

    def _in_lanes(self, which: I64, local: I64) -> tuple[I64, I64]:
        """Positions -> places among the pairs of their window, and lanes."""
        lane = self.lane_of(which, local)
        visit, offset = np.divmod(local, self._k)
        first = self._lane_start[which, lane]
        size = self._lane_start[which, lane + 1] - first
        whole = np.flatnonzero(visit < self.pairs[which] // self._k)
        key = lane_keys(self._epoch_key[which], self.window[which], lane)
        turned = permute(visit[whole] // self._lanes, size[whole], key[whole])
        visit[whole] = first[whole] + turned
        return visit * self._k + offset, lane

    def _in_visits(self, which: I64, local: I64) -> tuple[I64, I64, I64]:
        """`locate` with one lane and visits. Pairs that fill no whole visit of their shard are put
        together to visits, too; the last of them, fewer than k, end the window."""
        k = self._k
        visits, rest = self._visits_first, self._rest_first
        whole, loose = np.diff(visits)[which], np.diff(rest)[which]
        visit, offset = np.divmod(local, k)
        units = whole + loose // k
        moved = np.flatnonzero(visit < units)
        visit[moved] = self._shuffle.permute(visit[moved], which[moved])
        place, index = np.empty_like(local), np.empty_like(local)
        here = visit < whole
        at = visits[which[here]] + visit[here]
        place[here] = np.searchsorted(self._visits, at, side="right") - 1
        index[here] = (at - self._visits[place[here]]) * k + offset[here]
        left = np.flatnonzero(~here)
        at = (visit[left] - whole[left]) * k + offset[left]
        at = self._shuffle_loose.permute(at, which[left])
        at += rest[which[left]]
        place[left] = np.searchsorted(self._rest, at, side="right") - 1
        size = self._start[place[left] + 1] - self._start[place[left]]
        index[left] = size // k * k + at - self._rest[place[left]]
        return self._shard[place].astype(np.int64), index, np.zeros_like(local)


def _before(counts: I64) -> I64:
    """How many come before each of ranges, and in all."""
    return np.concatenate([[0], np.cumsum(counts)])
