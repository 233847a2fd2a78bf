"""A shuffle is as good as its window and visits predict, and a poor one is told from it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.cli.main import main
from shards.format.build import BuildSettings, build
from shards.order.draws import I64
from shards.order.epoch_order import EpochOrder, epoch_order
from shards.order.shuffle_quality import Storage, measured, predicted
from tests.conftest import small_records

BATCH, BATCHES, SHARDS = 64, 400, 24


@pytest.fixture(scope="module")
def storage() -> Storage:
    """Uneven shards of images with 1 to 30 sentences: about 20,000 pairs."""
    rng = np.random.default_rng(3)
    images = rng.integers(30, 80, SHARDS)
    counts = [rng.integers(1, 31, n) for n in images]
    first = np.concatenate([[0], np.cumsum([c.sum() for c in counts])])
    image = np.repeat(np.arange(images.sum()), np.concatenate(counts))
    return Storage(image, first)


def order_of(storage: Storage, window: int, k: int, epoch: int = 0, seed: int = 5) -> EpochOrder:
    return epoch_order(np.diff(storage.first), seed, epoch, window, 0, k)


def places(storage: Storage, order: EpochOrder) -> I64:
    """The position in the epoch of each pair, i64 (pairs,)."""
    shard, index = order.locate(np.arange(order.pairs))
    position = np.empty(order.pairs, dtype=np.int64)
    position[storage.first[shard] + index] = np.arange(order.pairs)
    return position


def drift(one: I64, other: I64) -> float:
    """Mean distance between a pair's places in two epochs, over their length: 1/3 where these are
    independent and uniform."""
    return float(np.abs(one - other).mean() / len(one))


def spread(storage: Storage, order: EpochOrder) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standard deviation of the places of each shard's pairs, over the epoch's length, and what it
    is for places that are uniform in the shard's window: its length / sqrt(12). Each (shards,)."""
    position = places(storage, order)
    found, expected = [], []
    edges = order.window_start()
    for place, shard in enumerate(order.shard_order.tolist()):
        window = place // order.window
        own = position[storage.first[shard] : storage.first[shard + 1]]
        found.append(own.std() / order.pairs)
        expected.append((edges[window + 1] - edges[window]) / order.pairs / np.sqrt(12))
    return np.asarray(found), np.asarray(expected)


def check(storage: Storage, order: EpochOrder, promised: EpochOrder) -> list[str]:
    """In what `order` differs from the prediction for `promised`, beyond chance.

    Means over 400 batches of 64 positions. Windows are few and differ, so a batch's expectation
    varies with its window: the bounds are 8 % for counts (four standard errors of the noisiest,
    same-image couples of a window of one shard) and 0.06 for the correlation (of 25,000 neighbours
    in about 24 / W windows).
    """
    expected = predicted(storage, promised, BATCH)
    found = measured(storage, order, BATCH, BATCHES, seed=1)
    return [
        name
        for name, bound in (
            ("same_image", 0.08 * expected.same_image + 0.25),
            ("images", 0.08 * expected.images),
            ("lag1", 0.06),
        )
        if abs(getattr(found, name) - getattr(expected, name)) > bound
    ]


@pytest.mark.parametrize("window", [1, 2, 6, 0])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_batches_are_shuffled_as_predicted(storage: Storage, window: int, k: int) -> None:
    order = order_of(storage, window, k)
    assert check(storage, order, order) == []


def test_more_of_a_visit_is_fewer_images_and_less_of_a_shuffle(storage: Storage) -> None:
    found = [predicted(storage, order_of(storage, 0, k), BATCH) for k in (1, 2, 4, 8)]
    for one, other in pairwise(found):
        assert other.images < one.images
        assert other.same_image > one.same_image and other.lag1 > one.lag1
    assert found[0].lag1 == pytest.approx(0, abs=1e-9)


class StorageOrder(EpochOrder):
    """No shuffle at all."""

    def locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = np.searchsorted(self.start, position, side="right") - 1
        return self.shard_order[place], position - self.start[place]


def test_a_poor_shuffle_is_found(storage: Storage) -> None:
    promised = order_of(storage, 0, 1)
    stored = StorageOrder(**vars(promised))
    assert check(storage, stored, promised) == ["same_image", "images", "lag1"]
    # A window of one shard, passed off as all; visits of two, passed off as single pairs.
    assert {"same_image", "lag1"} <= set(check(storage, order_of(storage, 1, 1), promised))
    assert check(storage, order_of(storage, 0, 2), promised) == ["same_image", "images", "lag1"]


@pytest.mark.parametrize("window", [1, 2, 6, 0])
def test_a_shards_pairs_are_spread_over_its_window(storage: Storage, window: int) -> None:
    found, expected = spread(storage, order_of(storage, window, 1))
    # The standard deviation of m uniform places is known to about 0.45 / sqrt(m) of itself.
    m = np.diff(storage.first)[order_of(storage, window, 1).shard_order]
    assert (np.abs(found / expected - 1) < 4 * 0.45 / np.sqrt(m)).all()


@pytest.mark.parametrize("window", [1, 6, 0])
def test_epochs_and_seeds_have_nothing_in_common(storage: Storage, window: int) -> None:
    orders = [order_of(storage, window, 1, epoch=e) for e in range(6)]
    orders += [order_of(storage, window, 1, seed=s) for s in range(6, 10)]
    where = [places(storage, order) for order in orders]
    # Places are independent from pair to pair with one window; else windows move as blocks.
    blocks = len(storage.image) if window == 0 else SHARDS / window
    couples = [(a, b) for a in range(len(where)) for b in range(a)]
    correlation = [np.corrcoef(where[a], where[b])[0, 1] for a, b in couples]
    assert max(map(abs, correlation)) < min(4.5 / np.sqrt(blocks), 0.95)
    assert abs(np.mean(correlation)) < 4 / np.sqrt(blocks * len(couples)) + 0.02
    drifts = [drift(where[a], where[b]) for a, b in couples]
    assert np.mean(drifts) == pytest.approx(1 / 3, abs=0.35 / np.sqrt(blocks) + 0.005)
    same = replace(orders[0])
    assert drift(where[0], places(storage, same)) == 0


def test_the_planner_prints_what_a_choice_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(small_records(40), tmp_path / "set", BuildSettings("planned", "t", images_per_shard=5))
    run = ["shards", "plan", str(tmp_path / "set"), "--cache", str(tmp_path / "cache")]
    run += ["--window", "0", "2", "--sentences-per-visit", "1", "3", "--batch", "16"]
    assert main([*run, "--cache-limit-gb", "0.0000001", "--steps-ahead", "0"]) == 0
    out = capsys.readouterr().out
    assert "planned: 40 images" in out and "8 shards of" in out
    table = [line.split() for line in out.splitlines() if line.split()[:1] in (["2"], ["all"])]
    assert [row[0] for row in table] == ["2", "all", "2", "2", "all", "all"]
    assert table[0][-1] == table[1][-1] == "no"
    images = {(row[0], row[1]): float(row[2]) for row in table[2:]}
    assert images["all", "3"] < images["all", "1"] and images["2", "3"] < images["2", "1"]
    assert images["2", "1"] <= 10  # of two shards
    visits = (["--sentences-per-visit", visit] for visit in ("0", str(2**63)))
    for wrong in (["--batch", "0"], ["--window", "-1"], *visits):
        with pytest.raises(SystemExit):
            main([*run, *wrong])
        assert f"argument {wrong[0]}: '{wrong[1]}' is no whole number" in capsys.readouterr().err
