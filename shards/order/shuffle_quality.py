"""How good a shuffle is: what its window and visits predict, and what its order really does.

The storage of a data set is described by the image of every pair, in storage order, and the pairs
of every shard. A perfect shuffle shows two positions of a batch the same image as seldom as chance
does, and has no correlation between neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.order.draws import I64
from shards.order.epoch_order import EpochOrder

_F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """How far batches are from a perfect shuffle."""

    same_image: float
    """Couples of positions in a batch that show one image."""
    images: float
    """Distinct images in a batch."""
    lag1: float
    """Correlation of the places in storage of pairs that follow each other."""


@dataclass(frozen=True)
class Storage:
    """How a data set lies in its shards."""

    image: I64
    """Of each pair, i64 (pairs,), equal ones side by side."""
    first: I64
    """First pair of each shard, i64 (shards + 1,)."""

    def visits(self, k: int) -> I64:
        """The visit of k neighbours that each pair belongs to, i64 (pairs,)."""
        pairs = np.arange(len(self.image))
        shard = np.searchsorted(self.first, pairs, side="right") - 1
        sizes = -(-np.diff(self.first) // k)
        before = np.concatenate([[0], np.cumsum(sizes)])
        return before[shard] + (pairs - self.first[shard]) // k


def predicted(storage: Storage, order: EpochOrder, batch: int) -> Quality:
    """What a uniform shuffle of the visits of each window gives, in expectation.

    Two positions of a batch of B are d apart in one visit of k with a frequency of
    (B - d)(k - d)/k; any other two are two pairs of the window, of different visits, by chance.
    So with n pairs of a window, of which T couples show one image, t of them within a visit, and
    v couples in all within a visit, another couple of positions shows one with probability
    (T - t) / (n(n - 1)/2 - v). An image with b visits is absent from a batch with probability
    (1 - B/n)^b. Neighbours are in one visit with probability (k - 1)/k, and else share their
    window alone, which accounts for the variance between windows' mean places.
    """
    k, n_all = order.k, len(storage.image)
    visit = storage.visits(k)
    same = distinct = between = 0.0
    place = np.arange(n_all)
    inside = np.asarray([(batch - d) * (k - d) / k for d in range(1, min(k, batch))])
    for w in range(-(-len(order.shard_order) // order.window)):
        shards = order.shard_order[w * order.window : (w + 1) * order.window]
        pairs = np.concatenate([np.arange(storage.first[s], storage.first[s + 1]) for s in shards])
        n = len(pairs)
        b = min(batch, n)
        image, where = storage.image[pairs], visit[pairs]
        # Equal images are side by side, and so are a visit's pairs: runs, no sorting.
        new_image = np.diff(image, prepend=-1) != 0
        counts = np.diff(np.append(np.flatnonzero(new_image), n))
        at_lag = [(where[d:] == where[:-d]) for d in range(1, len(inside) + 1)]
        hits = [((image[d:] == image[:-d]) & here).sum() for d, here in enumerate(at_lag, start=1)]
        couples = [here.sum() for here in at_lag]
        shares = np.asarray([h / max(c, 1) for h, c in zip(hits, couples, strict=True)])
        within = float((inside * shares).sum()) if len(inside) else 0.0
        rest = b * (b - 1) / 2 - float(inside.sum())
        total = float((counts * (counts - 1) / 2).sum()) - sum(hits)
        chance = total / max(n * (n - 1) / 2 - sum(couples), 1)
        same += n / n_all * (within + max(rest, 0.0) * chance)
        new_visit = new_image | (np.diff(where, prepend=-1) != 0)
        visits = np.add.reduceat(new_visit, np.flatnonzero(new_image), dtype=np.int64)
        distinct += n / n_all * float((1 - (1 - b / n) ** visits).sum())
        between += n / n_all * (pairs.mean() - place.mean()) ** 2
    share = between / place.var()
    return Quality(same, distinct, (k - 1) / k + share / k)


def measured(
    storage: Storage, order: EpochOrder, batch: int, batches: int, seed: int = 0
) -> Quality:
    """What so many batches at random positions of the epoch show."""
    n = len(storage.image)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, max(n - batch, 0) + 1, batches)
    couples, images, product = [], [], []
    mean, variance = (n - 1) / 2, (n * n - 1) / 12
    for start in starts.tolist():
        shard, index = order.locate(np.arange(start, min(start + batch, n)))
        pair = storage.first[shard] + index
        _, counts = np.unique(storage.image[pair], return_counts=True)
        couples.append((counts * (counts - 1) / 2).sum())
        images.append(len(counts))
        off = pair - mean
        product.append((off[1:] * off[:-1]).mean() / variance)
    return Quality(float(np.mean(couples)), float(np.mean(images)), float(np.mean(product)))
