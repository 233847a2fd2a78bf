"""The order of an epoch as a pure function: (seed, epoch, position) -> pair.

An epoch permutes the shards, cuts them into windows of W shards and walks each window through a
bijective permutation of its pairs, or of its visits: runs of k neighbouring pairs of a shard, most
of one image. Nothing of the size of the data set is ever built: an epoch's order holds a few
integers per shard, and a position costs O(log shards).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shards.order.draws import FACTORS, I64, U64, draw, fold

VERSION = 2
"""Of the order: another version of these functions gives another order for the same seed."""

# Eight half-rounds (four full Feistel rounds): from here on Luby-Rackoff's argument holds for a
# round function as good as a hash, and tests find no trace of the input's order.
_HALF_ROUNDS = 8


def permute(index: I64, length: int, key: int) -> I64:
    """The images of `index` (values in [0, length)) under a keyed bijection of [0, length).

    A Feistel network on the digits (l, r) of the index in a grid of about sqrt(length) rows and
    columns, with addition modulo their number in place of xor (Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains"), cycle-walked back into the range: the grid has less than one row
    too many, so hardly any index walks. length is below 2^62.
    """
    if length <= 1:
        return np.zeros_like(index)
    rows = math.isqrt(length - 1) + 1
    columns = -(-length // rows)
    keys = [np.uint64(fold(key, i)) for i in range(_HALF_ROUNDS)]
    out = _network(index.astype(np.uint64), rows, columns, keys)
    outside = np.flatnonzero(out >= np.uint64(length))
    while len(outside):
        walked = _network(out[outside], rows, columns, keys)
        out[outside] = walked
        outside = outside[walked >= np.uint64(length)]
    return out.view(np.int64)


def _network(x: U64, rows: int, columns: int, keys: list[np.uint64]) -> U64:
    sizes = np.uint64(rows), np.uint64(columns)
    # Row and column of each index in the grid; two arrays for scratch, and no other is made.
    digits = [x // sizes[1], np.empty_like(x)]
    np.subtract(x, digits[0] * sizes[1], out=digits[1])
    shift, a, b = np.uint64(32), np.empty_like(x), np.empty_like(x)
    for i, key in enumerate(keys):
        changed, other, size = digits[i % 2], digits[1 - i % 2], sizes[i % 2]
        # 32 hashed bits of the other digit, scaled to [0, size) by their product's high half.
        np.add(other, key, out=a)
        a *= FACTORS[0]
        np.right_shift(a, shift, out=b)
        a ^= b
        a *= FACTORS[1]
        a >>= shift
        a *= size
        a >>= shift
        # Modulo size: where the sum is below it, the difference wraps around and is the larger.
        changed += a
        np.subtract(changed, size, out=a)
        np.minimum(changed, a, out=changed)
    digits[0] *= sizes[1]
    digits[0] += digits[1]
    return digits[0]


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """One epoch's order over shards of given sizes."""

    shard_order: I64
    """Shard at each place of the epoch, i64 (places,); shards without pairs have none."""
    start: I64
    """Pairs before each place, i64 (places + 1,)."""
    visits: I64
    """Whole visits (of k pairs) before each place, i64 (places + 1,)."""
    window: int
    """Shards per window."""
    k: int
    """Pairs per visit."""
    key: int
    """Folded from seed, epoch and stream."""

    @property
    def pairs(self) -> int:
        return int(self.start[-1])

    def window_start(self) -> I64:
        """Pairs before each window, i64 (windows + 1,)."""
        return np.append(self.start[: -1 : self.window], self.start[-1])

    def locate(self, position: I64) -> tuple[I64, I64]:
        """Positions in the epoch -> (shard, index of the pair in that shard), each i64."""
        if not len(position):
            return position.copy(), position.copy()
        first, last = (self.window_of(int(p)) for p in (position.min(), position.max()))
        if first == last:
            return self._locate_in(first, position)
        shard, index = np.empty_like(position), np.empty_like(position)
        edges = self.start[np.arange(first + 1, last + 1) * self.window]
        window = first + np.searchsorted(edges, position, side="right")
        for w in range(first, last + 1):
            chosen = np.flatnonzero(window == w)
            shard[chosen], index[chosen] = self._locate_in(w, position[chosen])
        return shard, index

    def window_of(self, position: int) -> int:
        """The window of a position of the epoch."""
        return (int(np.searchsorted(self.start, position, side="right")) - 1) // self.window

    def _locate_in(self, window: int, position: I64) -> tuple[I64, I64]:
        """`locate` for positions of one window."""
        first = window * self.window
        last = min(first + self.window, len(self.shard_order))
        begin, end = int(self.start[first]), int(self.start[last])
        key, local = fold(self.key, window), position - begin
        if self.k == 1:
            at = begin + permute(local, end - begin, key)
            place = np.searchsorted(self.start, at, side="right") - 1
            return self.shard_order[place], at - self.start[place]
        # Pairs that fill no whole visit of their shard are put together to visits, too; the last
        # of them, fewer than k, end the window.
        visits, k = self.visits, self.k
        whole = int(visits[last] - visits[first])
        rest = self.start - visits * k  # such pairs before each place
        loose = int(rest[last] - rest[first])
        visit, offset = np.divmod(local, k)
        units = whole + loose // k
        shuffled = visit < units
        visit[shuffled] = permute(visit[shuffled], units, key)
        place, index = np.empty_like(local), np.empty_like(local)
        here = visit < whole
        at = int(visits[first]) + visit[here]
        place[here] = np.searchsorted(visits, at, side="right") - 1
        index[here] = (at - visits[place[here]]) * k + offset[here]
        left = ~here
        at = (visit[left] - whole) * k + offset[left]
        at = int(rest[first]) + permute(at, loose, fold(key, 1))
        place[left] = np.searchsorted(rest, at, side="right") - 1
        size = self.start[place[left] + 1] - self.start[place[left]]
        index[left] = size // k * k + at - rest[place[left]]
        return self.shard_order[place], index


def epoch_order(
    sizes: I64, seed: int, epoch: int, window: int, stream: int = 0, k: int = 1
) -> EpochOrder:
    """The order of `epoch` over shards with `sizes` pairs; window 0 = all shards; visits of k."""
    key = fold(seed, epoch, stream)
    visited = np.flatnonzero(sizes)
    shard_order = visited[np.argsort(draw(key, visited), kind="stable")]
    ordered = np.asarray(sizes, dtype=np.int64)[shard_order]
    start = np.concatenate([[0], np.cumsum(ordered)])
    visits = start if k == 1 else np.concatenate([[0], np.cumsum(ordered // k)])
    return EpochOrder(shard_order, start, visits, window or max(len(visited), 1), k, key)
