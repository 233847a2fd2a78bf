"""Exact shares: how many of the next things go to each of several takers, and who takes a step.

All arithmetic is on exact fractions, so nothing drifts at any count. Of K takers none is ever
further than 1 - 1/K from its share of everything handed out so far; of two, none is further than
one over any run of steps. (For three and more no rule can promise one over every run: it would
need all deviations in intervals of length one, which sum to zero only for special shares.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


def shares_of(weights: Sequence[float | Fraction]) -> tuple[Fraction, ...]:
    """Weights to shares of one; a decimal weight is taken as written. Their sum is positive."""
    exact = [w if isinstance(w, Fraction) else Fraction(str(w)) for w in weights]
    total = sum(exact)
    return tuple(w / total for w in exact)


@dataclass(frozen=True)
class Shares:
    """Exact shares as integers over one denominator: arithmetic on them is fast."""

    parts: tuple[int, ...]
    whole: int

    @classmethod
    def of(cls, shares: Sequence[Fraction]) -> Shares:
        whole = math.lcm(*(s.denominator for s in shares))
        return cls(tuple(s.numerator * (whole // s.denominator) for s in shares), whole)


def apportion(shares: Shares, taken: Sequence[int], count: int) -> tuple[int, ...]:
    """How many of the next `count` each gets, after `taken`: what is handed out in all follows the
    shares by largest remainder."""
    total = sum(taken) + count
    return _fill([part * total for part in shares.parts], shares.whole, taken, count, None)


def follow(
    share: Fraction, of: Sequence[int], taken: Sequence[int], count: int, room: Sequence[int]
) -> tuple[int, ...]:
    """Like `apportion`, towards a share of each of the totals `of`: the nearest whole numbers that
    `room` admits and that sum to `count` more than was taken. room: the most that each can take."""
    targets = [share.numerator * total for total in of]
    return _fill(targets, share.denominator, taken, count, room)


def _fill(
    targets: list[int], whole: int, taken: Sequence[int], count: int, room: Sequence[int] | None
) -> tuple[int, ...]:
    """targets: totals to come near to, in parts of `whole`."""
    low = list(taken)
    high = [t + (count if room is None else room[i]) for i, t in enumerate(taken)]
    out = [min(max(t // whole, a), b) for t, a, b in zip(targets, low, high, strict=True)]
    left = sum(taken) + count - sum(out)
    step = 1 if left > 0 else -1
    # Who is furthest from its target comes first, of equals the first one.
    waiting = [
        (-step * (targets[i] - n * whole), i)
        for i, n in enumerate(out)
        if (n < high[i] if left > 0 else n > low[i])
    ]
    heapq.heapify(waiting)
    for _ in range(abs(left)):
        distance, i = waiting[0]
        out[i] += step
        if out[i] < high[i] if step > 0 else out[i] > low[i]:
            heapq.heapreplace(waiting, (distance + whole, i))
        else:
            heapq.heappop(waiting)
    return tuple(n - t for n, t in zip(out, taken, strict=True))


def next_taker(shares: Sequence[Fraction], taken: Sequence[int]) -> int:
    """Who takes the next single thing, after `taken`: Tijdeman's rule for the chairman assignment
    problem (1980), which keeps every taker within 1 - 1/(2K - 2) of its share for ever."""
    active = [i for i, share in enumerate(shares) if share]
    if len(active) == 1:
        return active[0]
    slack = Fraction(1, 2 * len(active) - 2)
    ordinal = sum(taken) + 1
    due = {i: shares[i] * ordinal - taken[i] for i in active}
    eligible = [i for i in active if due[i] >= slack] or active
    return min(eligible, key=lambda i: (1 - slack - due[i]) / shares[i])
