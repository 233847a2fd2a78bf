"""Integers over one denominator apportion as fractions do."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from shards.order.apportionment import Shares, apportion, follow, shares_of


def nearest(
    targets: Sequence[Fraction], taken: Sequence[int], count: int, room: Sequence[int]
) -> tuple[int, ...]:
    """The rule as it reads: each the whole part of its target, then one at a time to or from
    whoever is furthest from its own, of equals the first."""
    high = [t + r for t, r in zip(taken, room, strict=True)]
    out = [min(max(int(t), a), b) for t, a, b in zip(targets, taken, high, strict=True)]
    while left := sum(taken) + count - sum(out):
        step = 1 if left > 0 else -1
        free = [i for i, n in enumerate(out) if (n < high[i] if step > 0 else n > taken[i])]
        out[max(free, key=lambda i: step * (targets[i] - out[i]))] += step
    return tuple(n - t for n, t in zip(out, taken, strict=True))


weights = st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 1.0, 1.7, 2.0, 3.0, 17.0, 1e-3])
takers = st.lists(st.tuples(weights, st.integers(0, 500)), min_size=1, max_size=12)


@given(takers, st.integers(0, 300))
def test_the_next_are_apportioned_as_by_fractions(of: list[tuple[float, int]], count: int) -> None:
    shares, taken = shares_of([w for w, _ in of]), [t for _, t in of]
    targets = [share * (sum(taken) + count) for share in shares]
    expected = nearest(targets, taken, count, [count] * len(of))
    assert apportion(Shares.of(shares), taken, count) == expected


@given(takers, st.sampled_from([0.0, 0.15, 1 / 3, 0.5, 1.0]), st.data())
def test_a_share_of_totals_is_followed_as_by_fractions(
    of: list[tuple[float, int]], value: float, data: st.DataObject
) -> None:
    share, taken = Fraction(str(value)), [t for _, t in of]
    room = [data.draw(st.integers(0, 60)) for _ in of]
    totals = [t + data.draw(st.integers(0, 200)) for t in taken]
    count = data.draw(st.integers(0, sum(room)))
    expected = nearest([share * t for t in totals], taken, count, room)
    assert follow(share, totals, taken, count, room) == expected
