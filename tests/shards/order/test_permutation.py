"""The order is a pure function, a bijection of every epoch, and shuffles as its window says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.order.draws import below, draw, fold, uniform
from shards.order.epoch_order import epoch_order
from shards.order.permutation import permute


@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permute_is_a_bijection(length: int, key: int) -> None:
    image = permute(np.arange(length), length, key)
    assert sorted(image.tolist()) == list(range(length))


def test_permute_of_a_billion_answers_for_any_position() -> None:
    n = 1_000_003_579
    position = np.array([0, 1, n // 2, n - 1])
    image = permute(position, n, 7)
    assert ((image >= 0) & (image < n)).all() and len(set(image.tolist())) == 4
    # One at a time gives the same as together.
    assert [int(permute(position[i : i + 1], n, 7)[0]) for i in range(4)] == image.tolist()


@pytest.mark.parametrize("window", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("k", [1, 2, 3, 50])
def test_an_epoch_holds_every_pair_once(window: int, k: int) -> None:
    sizes = np.asarray([7, 1, 13, 0, 29, 5])
    order = epoch_order(sizes, seed=3, epoch=1, window=window, k=k)
    shard, index = order.locate(np.arange(order.pairs))
    assert sorted(zip(shard.tolist(), index.tolist(), strict=True)) == [
        (s, i) for s, size in enumerate(sizes) for i in range(size)
    ]


@pytest.mark.parametrize("k", [1, 4])
def test_any_cut_of_an_epoch_gives_the_same_order(k: int) -> None:
    order = epoch_order(np.asarray([50, 60, 70]), seed=1, epoch=0, window=2, k=k)
    whole = np.stack(order.locate(np.arange(180)))
    pieces = [np.stack(order.locate(np.arange(b, min(b + 7, 180)))) for b in range(0, 180, 7)]
    assert (np.concatenate(pieces, axis=1) == whole).all()


def test_a_window_bounds_the_shards_that_are_open_at_once() -> None:
    order = epoch_order(np.full(12, 100), seed=5, epoch=0, window=3)
    shard, _ = order.locate(np.arange(1200))
    for begin in range(0, 1200, 300):
        assert len(set(shard[begin : begin + 300].tolist())) == 3


def test_epochs_and_seeds_are_uncorrelated() -> None:
    n = 20_000
    runs = [
        permute(np.arange(n), n, fold(seed, epoch)).astype(float)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    bound = 4 / np.sqrt(n)  # four standard errors of a correlation of independent orders
    correlation = np.corrcoef(np.stack([*runs, np.arange(n, dtype=float)]))
    assert np.abs(correlation - np.eye(5)).max() < bound
    assert abs(np.corrcoef(runs[0][:-1], runs[0][1:])[0, 1]) < bound


def test_draws_are_uniform_and_pure() -> None:
    pair = np.arange(100_000)
    bits = draw(9, pair, 4)
    assert (draw(9, pair[::-1], 4)[::-1] == bits).all()
    values = uniform(bits)
    counts = np.bincount((values * 10).astype(int), minlength=10)
    # chi-square with 9 degrees of freedom: 27.9 is its 99.9 % point
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9
    assert abs(np.corrcoef(values, uniform(draw(9, pair, 5)))[0, 1]) < 0.013
    assert set(below(bits, 3).tolist()) == {0, 1, 2}
