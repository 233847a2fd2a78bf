"""No two uses of randomness have a key in common; few elements are permuted uniformly."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from shards.order import keys
from shards.order.draws import draw, fold
from shards.order.keys import Purpose
from shards.order.permutation import permute


def test_every_purpose_has_a_number_of_its_own() -> None:
    assert len({int(p) for p in Purpose}) == len(Purpose) == len(Purpose.__members__)


def test_keys_of_different_uses_are_different() -> None:
    """Version 2 has equal ones: the fifth epoch of stream 1 and the coins of stream 5 are one."""
    small = range(40)
    epoch = keys.epoch_key(3, 7, 0, 0)

    def of(version: int) -> list[int]:
        return [
            *(keys.epoch_key(version, 7, e, s) for e in small for s in small),
            *(keys.match_key(version, 7, s) for s in small),
            *(keys.arrange_key(version, 7, c) for c in small),
            *(keys.window_key(version, epoch, w) for w in small),
            *(keys.loose_key(version, epoch, w) for w in small),
            *(int(draw(keys.shards_key(version, epoch), s)[0]) for s in small),
            *(
                int(k)
                for w in small
                for k in keys.lane_keys(
                    np.full(40, epoch, np.uint64), np.full(40, w), np.arange(40)
                )
            ),
            *(
                int(k)
                for e in small
                for k in keys.pair_keys(version, 7, np.full(40, e), np.arange(40))
            ),
        ]

    assert len(set(of(3))) == len(of(3))
    assert len(set(of(2))) < len(of(2))
    assert keys.epoch_key(2, 7, 5, 1) == keys.match_key(2, 7, 5) == fold(7, 5, 1)


@pytest.mark.parametrize(
    ("n", "each"), [(3, False), (4, False), (5, False), (3, True), (4, True), (5, True), (6, True)]
)
def test_all_orders_of_few_elements_are_equally_likely(n: int, each: bool) -> None:
    orders = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    trials = 60 * len(orders)
    of_trials = draw(1, np.arange(trials))
    if each:
        index, key = np.tile(np.arange(n), trials), np.repeat(of_trials, n)
        found = permute(index, np.full(len(index), n), key).reshape(trials, n)
    else:
        found = np.stack([permute(np.arange(n), n, int(k)) for k in of_trials])
    counts = Counter(orders[tuple(row)] for row in found.tolist())
    expected = trials / len(orders)
    statistic = sum((counts[i] - expected) ** 2 / expected for i in range(len(orders)))
    # Wilson & Hilferty's quantile of chi², which chance exceeds once in a million times.
    freedom = len(orders) - 1
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 4.75 * spread**0.5) ** 3
    assert len(counts) == len(orders)


def test_elements_with_lengths_and_keys_of_their_own_are_permuted_as_alone() -> None:
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1, 200, 40), [1, 2, 63, 64, 65, 10**6, 10**12]])
    of_keys = rng.integers(0, 1 << 63, len(lengths)).astype(np.uint64)
    index = (rng.random(len(lengths)) * lengths).astype(np.int64)
    for small in (0, 64):
        found = permute(index, lengths, of_keys, small)
        alone = [
            int(permute(index[i : i + 1], int(lengths[i]), int(of_keys[i]), small)[0])
            for i in range(len(lengths))
        ]
        assert found.tolist() == alone


def test_it_is_a_bijection_with_many_lengths_at_once() -> None:
    lengths = [1, 2, 5, 63, 64, 100, 997]
    index = np.concatenate([np.arange(n) for n in lengths])
    each = np.repeat(lengths, lengths)
    found = permute(index, each, np.repeat(draw(3, np.arange(len(lengths))), lengths))
    for part, n in zip(np.split(found, np.cumsum(lengths)[:-1]), lengths, strict=True):
        assert sorted(part.tolist()) == list(range(n))
