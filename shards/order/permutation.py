"""Keyed bijections of [0, n), of which nothing is ever stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.order.draws import FACTORS, I64, U64, draw, fold

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
        return _sorted(index, length, key) if length < small else _walk(index, length, key)
    lengths, keys = np.broadcast_arrays(np.asarray(length), np.asarray(key, dtype=np.uint64))
    out = np.empty_like(index)
    few = lengths < small
    if few.any():
        at = np.flatnonzero(few)
        out[at] = _sorted(index[at], lengths[at], keys[at])
    if not few.all():
        at = np.flatnonzero(~few)
        out[at] = _walk(index[at], lengths[at], keys[at])
    return out


def _sorted(index: I64, length: int | I64, key: int | U64) -> I64:
    """`permute` by sorting draws: by one row of them, or by one for each index."""
    if isinstance(length, int):
        order = np.argsort(draw(key, np.arange(length)), kind="stable")
        return order[index] if length else index.copy()
    each = np.arange(int(length.max()))
    bits = draw(np.asarray(key)[:, None], each[None, :])
    bits[each[None, :] >= length[:, None]] = np.iinfo(np.uint64).max
    return np.argsort(bits, axis=1, kind="stable")[np.arange(len(index)), index]


def _walk(index: I64, length: int | I64, key: int | U64) -> I64:
    """`permute` by the network."""
    if isinstance(length, int) and isinstance(key, int):
        if length <= 1:
            return np.zeros_like(index)
        rows, columns = _grid(length)
        keys = [np.uint64(fold(key, i)) for i in range(_HALF_ROUNDS)]
        out = _network(index.astype(np.uint64), rows, columns, keys)
        outside = np.flatnonzero(out >= np.uint64(length))
        while len(outside):
            walked = _network(out[outside], rows, columns, keys)
            out[outside] = walked
            outside = outside[walked >= np.uint64(length)]
        return out.view(np.int64)
    length = np.asarray(length)
    distinct, which = np.unique(length, return_inverse=True)
    grids = np.asarray([_grid(n) for n in distinct.tolist()], dtype=np.uint64)[which.reshape(-1)]
    of_each = [draw(0, np.asarray(key), i) for i in range(_HALF_ROUNDS)]
    bound = length.astype(np.uint64)
    out = _network(index.astype(np.uint64), grids[:, 0], grids[:, 1], of_each)
    outside = np.flatnonzero(out >= bound)
    while len(outside):
        grid, part = grids[outside], [k[outside] for k in of_each]
        walked = _network(out[outside], grid[:, 0], grid[:, 1], part)
        out[outside] = walked
        outside = outside[walked >= bound[outside]]
    return out.view(np.int64)


def _grid(length: int) -> tuple[np.uint64, np.uint64]:
    """Rows and columns; a single value has a grid of one."""
    rows = math.isqrt(max(length - 1, 0)) + 1
    return np.uint64(rows), np.uint64(max(-(-length // rows), 1))


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
