"""Lanes: parts of a window that are shuffled for themselves, so that a node reads its own alone."""

from __future__ import annotations

import numpy as np
import pytest

from shards.order.draws import I64
from shards.order.epoch_order import Span, Windows, epoch_order, lane_starts, lane_turns
from shards.order.sampler import Sampler, make_sampler
from shards.order.settings import SamplerSettings
from shards.order.streams import Contents

SIZES = np.asarray([50, 13, 0, 61, 7, 44, 90, 1, 33, 20, 58])


def sampler_of(sizes: I64, **settings: object) -> Sampler:
    contents = Contents(sizes[:, None], ["pairs"], [])
    return make_sampler(SamplerSettings.model_validate(settings), 3, contents)


@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 8, 64, 1000])
def test_turns_take_from_every_lane_and_any_run_of_them_is_spread(lanes: int) -> None:
    turns = lane_turns(lanes)
    assert sorted(turns.tolist()) == list(range(lanes))
    # Of any run of turns a block of lanes gets its share within a few.
    twice = np.tile(turns, 2)
    for block in range(1, lanes, max(lanes // 5, 1)):
        hits = np.concatenate([[0], np.cumsum(twice < block)])
        for length in range(1, lanes + 1, max(lanes // 7, 1)):
            found = hits[length:] - hits[:-length]
            share = length * block / lanes
            assert np.abs(found - share).max() <= 2 + np.log2(lanes)


@pytest.mark.parametrize("lanes", [2, 3, 8, 64, 500])
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 4])
def test_an_epoch_has_every_pair_once_in_lanes_of_equal_size(
    lanes: int, window: int, k: int
) -> None:
    order = epoch_order(SIZES, seed=3, epoch=1, window=window, k=k, lanes=lanes)
    shard, index = order.locate(np.arange(order.pairs))
    found = set(zip(shard.tolist(), index.tolist(), strict=True))
    assert found == {(s, i) for s, n in enumerate(SIZES.tolist()) for i in range(n)}
    for w in range(order.windows):
        windows = Windows([Span(order, w, 0, 0, 0)])
        pairs = int(windows.pairs[0])
        local = np.arange(pairs)
        shards, _, lane = windows.locate(np.zeros(pairs, dtype=np.int64), local)
        sizes = np.bincount(lane // 1, minlength=lanes)
        assert sizes.max() - sizes.min() <= k + (k > 1) * (k - 1)
        np.testing.assert_array_equal(
            np.diff(lane_starts(pairs // k, lanes)),
            np.bincount(lane[: pairs // k * k : k], minlength=lanes),
        )
        for v in range(lanes):
            own = set(shards[lane == v].tolist())
            assert own == set(order.lane_shards(w, v, v + 1).tolist())
        # Neighbouring lanes lie beside each other, so that a rank's block reads few shards.
        half = order.lane_shards(w, 0, max(lanes // 2, 1)).tolist()
        assert half == order.shards(w).tolist()[: len(half)]


def test_the_pairs_of_a_visit_stay_in_one_lane_beside_each_other() -> None:
    order = epoch_order(np.full(6, 40), seed=3, epoch=0, window=3, k=4, lanes=5)
    windows = Windows([Span(order, 1, 0, 0, 0)])
    local = np.arange(int(windows.pairs[0]))
    shard, index, lane = windows.locate(np.zeros(len(local), dtype=np.int64), local)
    for i in range(0, len(local), 4):
        assert len(set(lane[i : i + 4].tolist())) == 1
        assert len(set(shard[i : i + 4].tolist())) == 1
        assert np.diff(index[i : i + 4]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["natural", "balanced", "alternating"])
def test_the_order_is_the_same_at_every_world_size(mode: str) -> None:
    table = np.stack([SIZES, SIZES[::-1]], 1)
    settings = SamplerSettings.model_validate({"mode": mode, "window": 3, "lanes": 6})
    sampler = make_sampler(settings, 3, Contents(table, ["cap", "vqa"], ["vqa"]))
    for step in sampler.steps_ahead(sampler.start(), 37, 900):
        whole = sampler.plan(step)
        for world in (2, 5, 6, 9, 40):
            parts = [sampler.slice(step, rank, world) for rank in range(world)]
            at = np.concatenate([p.offset for p in parts])
            back = np.argsort(at, kind="stable")
            assert sorted(at.tolist()) == list(range(step.count))
            for name in ("stream", "epoch", "shard", "index", "mismatched", "window", "lane"):
                joined = np.concatenate([getattr(p, name) for p in parts])[back]
                assert joined.tolist() == getattr(whole, name).tolist()


def test_four_lanes_a_rank_make_slices_even_to_a_quarter() -> None:
    sampler = sampler_of(np.full(64, 500), window=16, lanes=64)
    for world in (16, 13, 7, 3):
        sizes = np.zeros(world)
        for step in sampler.steps_ahead(sampler.start(), 512, 16 * 500):
            found = [len(sampler.slice(step, rank, world)) for rank in range(world)]
            assert max(found) <= 1.25 * 512 / world + 6
            sizes += found
        assert sizes.max() <= 1.25 * sizes.mean()


# --- what nodes read ----------------------------------------------------------------------------


def read_by(sampler: Sampler, world: int) -> list[set[tuple[int, int]]]:
    """Of each node of one rank, the (window, shard) that it reads in an epoch."""
    read: list[set[tuple[int, int]]] = [set() for _ in range(world)]
    pairs = sampler.streams[0].pairs
    for step in sampler.steps_ahead(sampler.start(), 640, pairs):
        for rank in range(world):
            part = sampler.slice(step, rank, world)
            read[rank] |= set(zip(part.window.tolist(), part.shard.tolist(), strict=True))
    return read


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 64])
def test_an_epoch_is_read_once_and_not_once_a_node(nodes: int) -> None:
    shards, window = 512, 128
    sampler = sampler_of(np.full(shards, 50), window=window, lanes=256)
    read = sum(map(len, read_by(sampler, nodes)))
    boundaries = (nodes - 1) * (shards // window)  # shards that two nodes' parts of a window share
    assert read <= shards + boundaries
    # Where the parts are of many shards that is next to nothing.
    assert nodes > 8 or read <= 1.1 * shards
    today = sampler_of(np.full(shards, 50), window=window)
    if nodes in (2, 4):
        assert sum(map(len, read_by(today, nodes))) == nodes * shards


def test_another_number_of_nodes_fetches_the_lanes_that_moved_alone() -> None:
    sampler = sampler_of(np.full(256, 50), window=64, lanes=64)
    before, after = read_by(sampler, 4), read_by(sampler, 5)
    fetched = sum(len(after[n] - (before[n] if n < 4 else set())) for n in range(5))
    # A part of 1/5 of the lanes that overlaps the 1/4 before it: ranks 1 to 4 of 5 get
    # 1/20, 2/20, 3/20 and 4/20 that they had not, boundaries aside.
    assert fetched <= 256 * (1 + 2 + 3 + 4) / 20 + 5 * 4
