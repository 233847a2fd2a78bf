"""The order of an epoch as a pure function: (seed, epoch, position) -> pair.

An epoch permutes the shards, cuts them into windows of W shards and walks each window through a
bijective permutation of its pairs. Nothing of the size of the data set is ever built: an epoch's
order holds a few integers per shard, and a position costs O(log shards).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Eight half-rounds (four full Feistel rounds): from here on Luby-Rackoff's argument holds for a
# round function as good as a hash, and tests find no trace of the input's order.
_HALF_ROUNDS = 8


def mix(value: U64) -> U64:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014), element by element, on uint64."""
    value = value ^ (value >> np.uint64(30))
    value = value * np.uint64(0xBF58476D1CE4E5B9)
    value = value ^ (value >> np.uint64(27))
    value = value * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def mix_int(value: int) -> int:
    """`mix` of one Python integer (taken modulo 2^64)."""
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def fold(*words: int) -> int:
    """One 64-bit key out of any number of integers; each word is mixed in turn."""
    key = 0
    for word in words:
        key = mix_int((key + _GOLDEN) ^ mix_int(word + _GOLDEN))
    return key


def draw(key: int, *words: U64 | I64 | int) -> U64:
    """Counter-based random bits: uint64, uniform, a pure function of the key and the words.

    Arrays among the words broadcast against each other. The same (key, words) give the same
    bits in any process, at any world size, in any order of asking.
    """
    state: U64 = np.asarray(key, dtype=np.uint64).reshape(1)
    for word in words:
        w = np.atleast_1d(np.asarray(word))  # a 0-d operand would warn of its overflow
        w = w.astype(np.int64).view(np.uint64) if w.dtype != np.uint64 else w
        state = mix((state + np.uint64(_GOLDEN)) ^ mix(w + np.uint64(_GOLDEN)))
    return state


def uniform(bits: U64) -> NDArray[np.float64]:
    """Random bits to float64 in [0, 1), 53 bits of resolution."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(bits: U64, bound: int | I64) -> I64:
    """Random bits to int64 in [0, bound); the modulo's bias is below bound / 2^64."""
    return (bits % np.asarray(bound, dtype=np.uint64)).astype(np.int64)


def permute(index: I64, length: int, key: int) -> I64:
    """The images of `index` (values in [0, length)) under a keyed bijection of [0, length).

    An unbalanced Feistel network over the next power of two, cycle-walked back into the range:
    fewer than two passes on average.
    """
    if length <= 1:
        return np.zeros_like(index)
    bits = (length - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [np.uint64(fold(key, i)) for i in range(_HALF_ROUNDS)]

    def network(x: U64) -> U64:
        low, high = x & low_mask, x >> low_bits
        for i, k in enumerate(keys):
            if i % 2:
                low = low ^ (mix(high ^ k) & low_mask)
            else:
                high = high ^ (mix(low ^ k) & high_mask)
        return (high << low_bits) | low

    out = network(index.astype(np.uint64))
    outside = np.flatnonzero(out >= length)
    while len(outside):
        walked = network(out[outside])
        out[outside] = walked
        outside = outside[walked >= length]
    return out.astype(np.int64)


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's order over shards of given sizes.

    shard_order: shard at each place of the epoch, i64 (shards,)
    start:       pairs before each place, i64 (shards + 1,)
    window:      shards per window
    key:         keyed by (seed, epoch)
    """

    shard_order: I64
    start: I64
    window: int
    key: int

    @property
    def pairs(self) -> int:
        return int(self.start[-1])

    def locate(self, position: I64) -> tuple[I64, I64]:
        """Positions in the epoch -> (shard, index of the pair in that shard), each i64."""
        places = len(self.shard_order)
        place_of = np.searchsorted(self.start, position, side="right") - 1
        window_of = place_of // self.window
        at = np.empty_like(position)
        for w in np.unique(window_of):
            begin = int(self.start[w * self.window])
            end = int(self.start[min((w + 1) * self.window, places)])
            chosen = window_of == w
            local = permute(position[chosen] - begin, end - begin, fold(self.key, int(w)))
            at[chosen] = begin + local
        place = np.searchsorted(self.start, at, side="right") - 1
        return self.shard_order[place], at - self.start[place]


@lru_cache(maxsize=16)
def epoch_order(
    sizes: tuple[int, ...], seed: int, epoch: int, window: int, stream: int = 0
) -> EpochOrder:
    """The order of `epoch` over shards with `sizes` pairs; window 0 = all shards."""
    key = fold(seed, epoch, stream)
    shard_order = np.argsort(draw(key, np.arange(len(sizes))), kind="stable").astype(np.int64)
    start = np.concatenate([[0], np.cumsum(np.asarray(sizes, dtype=np.int64)[shard_order])])
    return EpochOrder(shard_order, start, window or max(len(sizes), 1), key)
