"""Counter-based random numbers: the same key and words give the same bits everywhere.

Nothing here has a state, so a draw depends on no process, no world size and no order of asking.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_GOLDEN64 = np.uint64(_GOLDEN)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # SplitMix64's


def mix(value: U64) -> U64:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014), element by element, on uint64."""
    out = value >> np.uint64(30)
    out ^= value
    out *= FACTORS[0]
    shifted = out >> np.uint64(27)
    out ^= shifted
    out *= FACTORS[1]
    np.right_shift(out, np.uint64(31), out=shifted)
    out ^= shifted
    return out


@lru_cache(maxsize=4096)
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


def draw(key: int | U64, *words: U64 | I64 | int) -> U64:
    """Counter-based random bits: uint64, uniform, a pure function of the key and the words.

    Arrays among the key and the words broadcast against each other. The same (key, words) give
    the same bits in any process, at any world size, in any order of asking.
    """
    state: int | U64 = key
    for word in words:
        mixed: int | U64
        if isinstance(word, int):
            mixed = mix_int(word + _GOLDEN)
        else:
            mixed = mix(word.astype(np.uint64) + _GOLDEN64)
        if isinstance(state, int) and isinstance(mixed, int):
            state = mix_int((state + _GOLDEN & _MASK) ^ mixed)
            continue
        left: Any = state
        left = np.uint64(left + _GOLDEN & _MASK) if isinstance(state, int) else left + _GOLDEN64
        right: Any = np.uint64(mixed) if isinstance(mixed, int) else mixed
        state = mix(left ^ right)
    return np.full(1, state, dtype=np.uint64) if isinstance(state, int) else state


def halves(bits: U64) -> U32:
    """Two numbers of 32 random bits of each of 64, beside each other: (…, n) to (…, 2n)."""
    return bits.astype("<u8", copy=False).view("<u4")


def uniform(bits: U64 | U32) -> NDArray[np.float64]:
    """Random bits to float64 in [0, 1), 53 or 32 bits of resolution."""
    if bits.dtype == np.uint32:
        return bits.astype(np.float64) * 2.0**-32
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def chance(bits: U64 | U32, probability: float) -> NDArray[np.bool_]:
    """Random bits to True with the given probability."""
    if probability >= 1:
        return np.ones(bits.shape, dtype=bool)
    return bits < bits.dtype.type(int(probability * 2 ** (8 * bits.itemsize)))


def below(bits: U64, bound: int | I64) -> I64:
    """Random bits to int64 in [0, bound); the modulo's bias is below bound / 2^64."""
    return (bits % np.asarray(bound, dtype=np.uint64)).astype(np.int64)
