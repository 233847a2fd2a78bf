"""What comes when: which shards a process uses, which it will, and how many bytes at once.

Time is counted in pairs of the run. `behind` is by how many pairs other processes of the node may
be behind a state: what they use is in use.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.order.draws import I64
from shards.order.epoch_order import EpochOrder
from shards.order.sampler import Sampler, SamplerState

IN_USE = -1.0
"""The time of what is in use."""


@dataclass
class _Standing:
    """Where a stream stands."""

    order: EpochOrder
    epoch: int
    window: int
    end: int
    """The stream's position at which it leaves the window."""
    own: I64
    """The window's shards that the process uses."""
    left: NDArray[np.int64]
    """Shards that it left less than `behind` pairs ago."""
    left_until: int
    """The stream's position at which there are fewer of these."""


class Future:
    """The shards to come, for a process that goes through the steps from some state on.

    lanes: [first, last) of the process; behind: pairs; total: of the run. What is asked costs
    little beside the shards it names, and nothing is made for shards that are not asked for.
    """

    def __init__(self, sampler: Sampler, lanes: tuple[int, int], behind: int, total: int) -> None:
        self._sampler, self._lanes, self._behind, self._total = sampler, lanes, behind, total
        self._standing: list[_Standing] = []
        self._begin: list[float] = []
        self._skipped: I64 = np.zeros(0, dtype=np.int64)
        self.consumed = 0
        """Pairs, when a stream last entered or left a window."""
        self._place_of: dict[tuple[int, int], NDArray[np.int32]] = {}

    def at(self, state: SamplerState) -> bool:
        """Go to a state. Whether a stream has entered a window since, or left one for good."""
        fresh = not self._standing
        changed = fresh or len(state.skipped) != len(self._skipped)
        rates = self._sampler.rates
        for i, cursor in enumerate(state.cursors):
            back = max(cursor - int(self._behind * rates[i]), 0)
            if fresh:
                self._standing.append(self._stand(i, cursor, back))
                continue
            here = self._standing[i]
            if cursor >= here.end or back >= here.left_until:
                self._standing[i] = self._stand(i, cursor, back)
                changed = True
        if changed:
            self.consumed = state.consumed
            self._skipped = np.asarray(state.skipped_shards, dtype=np.int64)
            # The time of a stream's position 0, by the shares.
            self._begin = [
                state.consumed - c / max(r, 1e-12)
                for c, r in zip(state.cursors, rates, strict=True)
            ]
            held = {(i, s.epoch + n) for i, s in enumerate(self._standing) for n in (0, 1)}
            places = list(self._place_of.items())  # to which another thread may add
            self._place_of = {k: v for k, v in places if k in held}
        return changed

    def as_it_stands(self) -> Future:
        """The same, which stays where it is: for other threads to ask, one at a time."""
        out = copy.copy(self)
        out._standing = list(self._standing)
        return out

    def _stand(self, stream: int, cursor: int, back: int) -> _Standing:
        pairs = self._sampler.streams[stream].pairs
        epoch, position = divmod(cursor, pairs)
        order = self._sampler.order(stream, epoch)
        window = order.window_of(position)
        end = epoch * pairs + order.begin(window + 1)
        left, until = [np.zeros(0, dtype=np.int64)], end + (cursor - back)
        e, position = divmod(back, pairs)
        before = self._sampler.order(stream, e)
        w = before.window_of(position)
        if (e, w) != (epoch, window):
            until = e * pairs + before.begin(w + 1)
        while (e, w) != (epoch, window):
            left.append(before.lane_shards(w, 0, before.lanes))
            w += 1
            if w == before.windows:
                e, w = e + 1, 0
                before = self._sampler.order(stream, e)
        own = order.lane_shards(window, *self._lanes)
        return _Standing(order, epoch, window, end, own, np.concatenate(left), until)

    # --- what is asked --------------------------------------------------------------------------

    def now(self) -> I64:
        """The shards that this process uses, rising; none of those that are passed over."""
        return np.setdiff1d(np.concatenate([s.own for s in self._standing]), self._skipped)

    def due(self, shards: I64) -> NDArray[np.float64]:
        """When each shard is needed next by any process of the run; IN_USE where it is in use, or
        may be by processes that are behind; infinity where it is not needed again."""
        out = np.full(len(shards), np.inf)
        if not len(shards):
            return out
        rates = self._sampler.rates
        in_use = np.zeros(len(shards), dtype=bool)
        few = shards.astype(np.int32)  # as streams have them: else numpy converts all of theirs
        first, last = shards.min(), shards.max()
        for i, here in enumerate(self._standing):
            stream = self._sampler.streams[i]
            if last < stream.shards[0] or stream.shards[-1] < first:
                continue
            at = np.searchsorted(stream.shards, few).clip(max=len(stream.shards) - 1)
            mine = np.flatnonzero(stream.shards[at] == shards)
            if not len(mine):
                continue
            at, pairs = at[mine], stream.pairs
            window = self._places(i, here.epoch)[at] // here.order.window
            position = np.empty(len(mine), dtype=np.int64)
            later = window > here.window
            starts = here.order.start
            position[later] = here.epoch * pairs + starts[window[later] * here.order.window]
            gone = np.flatnonzero(window < here.window)
            if len(gone):
                after = self._sampler.order(i, here.epoch + 1)
                next_ = self._places(i, here.epoch + 1)[at[gone]] // after.window
                position[gone] = (here.epoch + 1) * pairs + after.start[next_ * after.window]
            when = self._begin[i] + position / max(rates[i], 1e-12)
            now = window == here.window
            if self._lanes == (0, here.order.lanes):
                in_use[mine[now]] = True
            else:
                in_use[mine[now]] |= np.isin(shards[mine[now]], here.own)
            # Other lanes' may be in use, too, but perhaps on other nodes.
            when[now] = self.consumed
            out[mine] = np.minimum(out[mine], when)
            if len(here.left):
                in_use |= np.isin(shards, here.left)
        out[out >= self._total] = np.inf
        out[in_use] = IN_USE
        out[np.isin(shards, self._skipped)] = np.inf
        return out

    def upcoming(self) -> Iterator[tuple[int, float, bool]]:
        """(shard, when, soon) of the process's shards in the order of need, until the run's end; 0
        for those in use. soon: a stream is in its window, or enters it next. A shard may come more
        than once."""
        streams = [self._of_stream(i, here) for i, here in enumerate(self._standing)]
        skipped = set(self._skipped.tolist())
        for when, _, soon, shards in heapq.merge(*streams):
            for shard in shards:
                if shard not in skipped:
                    yield shard, when, soon

    def _of_stream(
        self, stream: int, here: _Standing
    ) -> Iterator[tuple[float, int, bool, Sequence[int]]]:
        order, epoch, window = here.order, here.epoch, here.window
        pairs, rate = self._sampler.streams[stream].pairs, self._sampler.rates[stream]
        yield 0.0, stream, True, here.own.tolist()
        # While others may be in the window before, the next one's shards displace none: those of
        # the one before may be due last.
        soon = not len(here.left)
        while rate:
            window += 1
            if window == order.windows:
                epoch, window = epoch + 1, 0
                # Far epochs would take the place of those in use.
                near = epoch <= here.epoch + 1
                order = (self._sampler.order if near else self._sampler.new_order)(stream, epoch)
            when = self._begin[stream] + (epoch * pairs + order.begin(window)) / rate
            if when >= self._total:
                return
            yield when, stream, soon, order.lane_shards(window, *self._lanes).tolist()
            soon = False

    def _places(self, stream: int, epoch: int) -> NDArray[np.int32]:
        """The place in an epoch of a stream of each of its shards."""
        found = self._place_of.get((stream, epoch))
        if found is None:
            order = self._sampler.order(stream, epoch)
            shards = self._sampler.streams[stream].shards
            first = int(shards[0])
            of_all = np.empty(int(shards[-1]) - first + 1, dtype=np.int32)
            of_all[order.shard_order - first] = np.arange(len(shards), dtype=np.int32)
            found = of_all[shards - first]
            self._place_of[stream, epoch] = found
        return found


def working_set(
    sampler: Sampler, shard_bytes: I64, in_flight: int, ranks: int = 1, world: int = 1
) -> int:
    """Bytes of the shards that steps in flight can need at once on a node, at most: of every stream
    the windows that `in_flight` consecutive pairs can touch, or the node's part of them.

    ranks: of the `world` ranks, how many are on the node.
    """
    total = 0
    lanes = sampler.settings.lanes
    for stream, rate in zip(sampler.streams, sampler.rates, strict=True):
        visited = stream.shards
        window = sampler.settings.window or len(visited)
        pairs = int(in_flight * rate) + 1
        smallest = int(np.sort(stream.sizes)[:window].sum())
        windows = 2 + pairs // max(smallest, 1)
        # Whole lanes of each rank, which begin and end within a shard.
        share = min(1.0, ranks * -(-lanes // world) / lanes)
        largest = stream.sizes.max() * window / max(smallest, 1)
        part = window if share == 1.0 else int(window * share * largest) + 1 + 2 * ranks
        shards = min(window, part) * windows
        # An epoch's last window may be smaller, and then all of it lies between two others.
        shards += len(visited) % window * (1 + pairs // stream.pairs)
        total += int(np.sort(shard_bytes[visited])[::-1][:shards].sum())
    used = np.unique(np.concatenate([s.shards for s in sampler.streams]))
    return min(total, int(shard_bytes[used].sum()))
