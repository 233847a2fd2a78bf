"""What comes when: which shards the streams of a sampler need next, and how many bytes at once.

Time is counted in pairs of the run. `behind` is by how many pairs other processes of the node may
be behind a state: what they use is in use.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.order.draws import I64
from shards.order.sampler import Sampler, SamplerState


def next_use(sampler: Sampler, state: SamplerState, behind: int = 0) -> NDArray[np.float64]:
    """For each shard, pairs that will be consumed before its next window begins, f64 (shards,).

    0 for the shards of the windows that the streams stand in, -1 for those that were left less
    than `behind` pairs ago, where others may still be; inf for shards that no stream visits.
    """
    out = np.full(len(sampler.streams[0].sizes), np.inf)
    left = np.zeros(len(out), dtype=bool)
    for stream, cursor, rate in zip(sampler.streams, state.cursors, sampler.rates(), strict=True):
        back = max(cursor - int(behind * rate), 0)
        for epoch in range(back // stream.pairs, cursor // stream.pairs + 2):
            order = sampler.order(stream, epoch)
            edges = epoch * stream.pairs + order.window_start()
            window_of = np.arange(len(order.shard_order)) // order.window
            begin, end = edges[window_of], edges[window_of + 1]
            shards = order.shard_order
            left[shards[(end > back) & (end <= cursor)]] = True
            due = np.where(end > cursor, np.maximum(begin - cursor, 0) / max(rate, 1e-12), np.inf)
            out[shards] = np.minimum(out[shards], due)
    return np.where(left & (out > 0), -1.0, out)


def next_windows(sampler: Sampler, state: SamplerState, behind: int = 0) -> NDArray[np.bool_]:
    """Which shards are in the window that a stream enters next, bool (shards,).

    None of a stream that left its last window less than `behind` pairs ago: that one's shards are
    still in use, and may be those that are due last.
    """
    out = np.zeros(len(sampler.streams[0].sizes), dtype=bool)
    for stream, cursor, rate in zip(sampler.streams, state.cursors, sampler.rates(), strict=True):
        epoch, position = divmod(cursor, stream.pairs)
        order = sampler.order(stream, epoch)
        now = order.window_of(position)
        edges = order.window_start()
        if cursor and position - int(behind * rate) < edges[now]:
            continue
        if now + 2 == len(edges):
            order, now = sampler.order(stream, epoch + 1), -1
        out[order.shard_order[(now + 1) * order.window : (now + 2) * order.window]] = True
    return out


def windows_at(sampler: Sampler, state: SamplerState, behind: int = 0) -> tuple[int, ...]:
    """Which windows the streams stand in and have left less than `behind` pairs ago: `next_use` is
    another only when these are."""
    out: list[int] = []
    for stream, cursor, rate in zip(sampler.streams, state.cursors, sampler.rates(), strict=True):
        for at in (cursor, max(cursor - int(behind * rate), 0)):
            epoch, position = divmod(at, stream.pairs)
            order = sampler.order(stream, epoch)
            out += [epoch, order.window_of(position)]
    return tuple(out)


def working_set(sampler: Sampler, shard_bytes: I64, in_flight: int) -> int:
    """Bytes of the shards that steps in flight can need at once, at most: of every stream the
    windows that `in_flight` consecutive pairs can touch."""
    total = 0
    for stream, rate in zip(sampler.streams, sampler.rates(), strict=True):
        visited = np.flatnonzero(stream.sizes)
        window = sampler.settings.window or len(visited)
        pairs = int(in_flight * rate) + 1
        smallest = int(np.sort(stream.sizes[visited])[:window].sum())
        shards = window * (2 + pairs // max(smallest, 1))
        # An epoch's last window may be smaller, and then all of it lies between two others.
        shards += len(visited) % window * (1 + pairs // stream.pairs)
        total += int(np.sort(shard_bytes[visited])[::-1][:shards].sum())
    used = np.any([s.sizes > 0 for s in sampler.streams], axis=0)
    return min(total, int(shard_bytes[used].sum()))
