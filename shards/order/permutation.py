"""Keyed bijections of [0, n), of which nothing is ever stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.order.draws import FACTORS, I64, U64, draw

# Eight half-rounds (four full Feistel rounds): from here on Luby-Rackoff's argument holds for a
# round function as good as a hash, and tests find no trace of the input's order.
_HALF_ROUNDS = 8

SMALL = 64
"""Below it a network of so few values is far from uniform: they are sorted by their draws."""


def permute(index: I64, length: int | I64, key: int | U64, small: int = SMALL) -> I64:
    """The images of `index`, i64 (n,) with values in [0, length), under a keyed bijection of
    [0, length). Lengths and keys may be of each element: (n,). Lengths are below 2^62.

    A Feistel network on the digits (l, r) of the index in a grid of about sqrt(length) rows and
    columns, with addition modulo their number in place of xor (Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains"), cycle-walked back into the range: the grid has less than one row
    too many, so hardly any index walks. Where length is below `small`, all orders are equally
    likely instead.
    """
    if isinstance(length, int) and isinstance(key, int):
        one = Bijections(np.asarray([length]), np.asarray([key % (1 << 64)], np.uint64), small)
        return one.permute(index, np.zeros_like(index))
    lengths, keys = np.broadcast_arrays(np.asarray(length), np.asarray(key, dtype=np.uint64))
    return Bijections(lengths, keys, small).permute(index, np.arange(len(index)))


class Bijections:
    """Those of `permute` for some lengths and keys, each (n,), made ready to be used often."""

    def __init__(self, lengths: I64, keys: U64, small: int = SMALL) -> None:
        self._lengths, self._keys, self._few = lengths, keys, lengths < small
        self._rows, self._columns = _grids(lengths)
        self._rounds = [draw(0, keys, i) for i in range(_HALF_ROUNDS)]

    def permute(self, index: I64, which: I64) -> I64:
        """The images of `index`, i64 (m,), each under the bijection `which`, i64 (m,)."""
        if len(which) and (which == which[0]).all():
            return self._of_one(index, int(which[0]))
        few = self._few[which]
        if not few.any():
            return self._walk(index, which)
        out, at = np.empty_like(index), np.flatnonzero(few)
        out[at] = _sorted(index[at], self._lengths[which[at]], self._keys[which[at]])
        at = np.flatnonzero(~few)
        out[at] = self._walk(index[at], which[at])
        return out

    def _of_one(self, index: I64, which: int) -> I64:
        """`permute` by a single bijection, which takes half the time."""
        length = int(self._lengths[which])
        if self._few[which]:
            return _sorted(index, length, int(self._keys[which]))
        keys = [k[which] for k in self._rounds]
        return _walk(index, length, (self._rows[which], self._columns[which]), keys)

    def _walk(self, index: I64, which: I64) -> I64:
        out = self._network(index.astype(np.uint64), which)
        bound = self._lengths[which].astype(np.uint64)
        outside = np.flatnonzero(out >= bound)
        while len(outside):
            walked = self._network(out[outside], which[outside])
            out[outside] = walked
            outside = outside[walked >= bound[outside]]
        return out.view(np.int64)

    def _network(self, x: U64, which: I64) -> U64:
        keys = [k[which] for k in self._rounds]
        return _network(x, self._rows[which], self._columns[which], keys)


def _sorted(index: I64, length: int | I64, key: int | U64) -> I64:
    """`permute` by sorting draws: by one row of them, or by one for each index."""
    if isinstance(length, int):
        order = np.argsort(draw(key, np.arange(length)), kind="stable")
        return order[index] if length else index.copy()
    each = np.arange(int(length.max()))
    bits = draw(np.asarray(key)[:, None], each[None, :])
    bits[each[None, :] >= length[:, None]] = np.iinfo(np.uint64).max
    return np.argsort(bits, axis=1, kind="stable")[np.arange(len(index)), index]


def _walk(
    index: I64, length: int, grid: tuple[np.uint64, np.uint64], keys: Sequence[np.uint64]
) -> I64:
    """`permute` by the network, on a grid of so many rows and columns."""
    out = _network(index.astype(np.uint64), *grid, keys)
    outside = np.flatnonzero(out >= np.uint64(length))
    while len(outside):
        walked = _network(out[outside], *grid, keys)
        out[outside] = walked
        outside = outside[walked >= np.uint64(length)]
    return out.view(np.int64)


def _grids(lengths: I64) -> tuple[U64, U64]:
    """Rows and columns for each length: √length, rounded up, and as many as it takes."""
    below = np.maximum(lengths - 1, 0)
    root = np.sqrt(below.astype(np.float64)).astype(np.int64)
    # The floating-point root of a large number may be one off.
    root -= root * root > below
    root += (root + 1) * (root + 1) <= below
    rows = root + 1
    columns = np.maximum(-(-lengths // rows), 1)
    return rows.astype(np.uint64), columns.astype(np.uint64)


def _network(x: U64, rows: Any, columns: Any, keys: Sequence[Any]) -> U64:
    """The network on a grid, one for all or one of each index: uint64, as are the keys."""
    sizes = rows, columns
    # Row and column of each index in the grid; two arrays for scratch, and no other is made.
    digits = [x // columns, np.empty_like(x)]
    np.subtract(x, digits[0] * columns, out=digits[1])
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
    digits[0] *= columns
    digits[0] += digits[1]
    return digits[0]
