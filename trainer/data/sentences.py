"""Which sentence is shown with a pair: its own, or, where it is mismatched, another image's.

Under `data.text: all` that is any of the pair's data set, by chance; under `window` any of the
shards that are read at the time: those of the pair's lane of the window (its neighbourhood). Both
are pure functions of (seed, epoch, pair).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.dataset import Dataset
from shards.errors import DataError
from shards.order.draws import I64, U64, below, draw
from shards.order.keys import Purpose
from shards.order.sampler import Plan, Sampler


@dataclass(frozen=True)
class Pairs:
    """The pairs of a plan, as rows of the data's index; i64 (pairs,) each."""

    row: I64
    image: I64
    key: U64
    """All that is drawn for a pair starts here."""


def shards_of_text(data: Dataset, sampler: Sampler, plan: Plan, skipped: Sequence[int]) -> I64:
    """The shards whose tables a plan's pairs need, distinct. skipped: those that cannot be had."""
    own = np.unique(plan.shard)
    if data.text == "all" or not plan.mismatched.any():
        return own
    near = _neighbourhoods(data, sampler, plan, np.flatnonzero(plan.mismatched), skipped)
    return np.unique(np.concatenate([own, near.shards]))


def sentences_of(
    data: Dataset, sampler: Sampler, plan: Plan, pairs: Pairs, skipped: Sequence[int]
) -> I64:
    """The sentence shown with each pair, as rows of the data's index. DataError where a mismatched
    pair has no other image's to get."""
    sentence = pairs.row.copy()
    todo = np.flatnonzero(plan.mismatched)
    if len(todo):
        near = None if data.text == "all" else _neighbourhoods(data, sampler, plan, todo, skipped)
        chosen = Pairs(pairs.row[todo], pairs.image[todo], pairs.key[todo])
        if near is None:
            sentence[todo] = _of_data_set(data, plan.dataset[todo], chosen)
        else:
            sentence[todo] = _of_neighbourhood(data, near, plan.shard[todo], chosen)
    return sentence


def _of_data_set(data: Dataset, dataset: I64, pairs: Pairs) -> I64:
    """A sentence of another image for each pair, uniform over all of its data set."""
    edges = data.dataset_pairs
    first, total = edges[dataset], edges[dataset + 1] - edges[dataset]
    for name, images in data.images_with_sentences:
        if images < 2:
            raise DataError(f"matching needs sentences of two images, the data set {name} has one")
    sentence, todo, attempt = np.empty_like(pairs.row), np.arange(len(pairs.row)), 0
    while len(todo):
        other = first + below(draw(pairs.key[todo], Purpose.SENTENCE, attempt), total)
        sentence[todo] = other
        again = data.image_of(other) == pairs.image[todo]
        todo, first, total = todo[again], first[again], total[again]
        attempt += 1
    return sentence


# --- neighbourhoods -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Near:
    """The neighbourhoods of some pairs, one after the other."""

    of: I64
    """The neighbourhood of each pair."""
    shards: I64
    """Of all neighbourhoods, rising in each."""
    start: I64
    """Where each neighbourhood's shards begin, and where the last one's end."""


def _neighbourhoods(
    data: Dataset, sampler: Sampler, plan: Plan, rows: I64, skipped: Sequence[int]
) -> _Near:
    """Those of the pairs `rows` of a plan, without the shards that cannot be had. One that is of a
    single image has the shard beside it in the order, too, or else the one of the next number."""
    columns = (plan.stream, plan.epoch, plan.window, plan.lane)
    where, of = np.unique(np.stack([c[rows] for c in columns], 1), axis=0, return_inverse=True)
    lost = np.asarray(skipped, dtype=np.int64)
    found = []
    for stream, epoch, window, lane in where.tolist():
        shards = np.sort(sampler.neighbourhood(stream, epoch, window, lane))
        shards = shards[~np.isin(shards, lost)] if len(lost) else shards
        if data.manifest.shards.images[shards].sum() == 1:
            alone = int(shards[0])
            shards = np.sort(sampler.order(stream, epoch).with_nearest(alone, lost))
            shards = shards if len(shards) > 1 else _beside(data, alone, lost)
        found.append(shards)
    start = np.concatenate([[0], np.cumsum([len(shards) for shards in found])])
    return _Near(of.reshape(-1), np.concatenate(found), start)


def _beside(data: Dataset, shard: int, lost: I64) -> I64:
    """A shard, and the one nearest to it by number of its data set, of whatever stream; rising."""
    end = next(r.end for r in data.shard_ranges if shard < r.end)
    begin = next(r.begin for r in data.shard_ranges if r.end == end)
    others = begin + np.flatnonzero(np.diff(data.manifest.shards.pair_start[begin : end + 1]))
    others = np.setdiff1d(others, np.append(lost, shard))
    nearest = others[np.argsort(np.abs(others - shard), kind="stable")[:1]]
    return np.sort(np.append(nearest, shard))


def _of_neighbourhood(data: Dataset, near: _Near, shard: I64, pairs: Pairs) -> I64:
    """A sentence of another image for each pair, uniform over its neighbourhood. shard: of each
    pair."""
    m = data.index
    place = m.place_of(near.shards)
    # Sentences are counted through the neighbourhoods, and in each through its shards.
    ends = np.cumsum(m.shard_pair[place + 1] - m.shard_pair[place])
    before = np.concatenate([[0], ends])
    first, last = before[near.start[near.of]], before[near.start[near.of + 1]]
    own = m.image_pair[pairs.image + 1] - m.image_pair[pairs.image]
    others = last - first - own
    if len(alone := np.flatnonzero(others <= 0)):
        name = data.shards.files[int(shard[alone[0]])].url
        raise DataError(
            f"matching needs sentences of two images, but of those that can be had with {name} "
            "there is one: set sampler.mismatch=0, or mend the shards that are skipped, if any are"
        )
    chosen = first + below(draw(pairs.key, Purpose.SENTENCE, 0), others)
    # The own image's sentences, which lie together, are left out.
    width = int(near.shards.max()) + 1
    each = np.repeat(np.arange(len(near.start) - 1), np.diff(near.start))
    at = np.searchsorted(each * width + near.shards, near.of * width + shard)
    begin = before[at] + m.image_pair[pairs.image] - m.shard_pair[place[at]]
    chosen += np.where(chosen >= begin, own, 0)
    which = np.searchsorted(ends, chosen, side="right")
    found: NDArray[np.int64] = m.shard_pair[place[which]] + chosen - before[which]
    return found
