"""With lanes a node fetches the shards of its own lanes, and all of them an epoch once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from shards.dataset import open_dataset
from shards.format.build import BuildSettings, build
from shards.order.settings import SamplerSettings
from tests.conftest import small_records
from tests.trainer.data.test_batches import SEED, drawn
from trainer.data.loader import RankSlice, load_steps
from trainer.sections import LoaderSettings

SHARDS, WINDOW = 48, 24
LANES = SamplerSettings(window=WINDOW, lanes=24)


@pytest.fixture(scope="module")
def url(s3: str) -> str:
    settings = BuildSettings("nodes", "test", images_per_shard=2)
    build(small_records(2 * SHARDS), f"{s3}/nodes", settings)
    return f"{s3}/nodes"


def epoch(
    url: str, caches: list[Path], settings: SamplerSettings, text: Literal["all", "window"]
) -> list[int]:
    """An epoch, by a node with one rank for each of the caches; the pairs in order. What comes
    later is not fetched."""
    found: dict[int, int] = {}
    for rank, cache in enumerate(caches):
        data = open_dataset(url, cache, text=text)
        sampler = data.sampler(settings, SEED)
        steps = load_steps(
            data,
            sampler,
            drawn(data),
            RankSlice(rank, len(caches), 1, local=1),
            sampler.start(),
            20,
            data.manifest.pairs,
            LoaderSettings(fetch_threads=3),
        )
        for loaded in steps:
            assert not loaded.missing
            (batch,) = loaded.batches
            at = loaded.step.before.consumed + batch.offset.numpy()
            found.update(zip(at.tolist(), batch.pair_id.tolist(), strict=True))
    assert sorted(found) == list(range(len(found)))
    return [found[i] for i in range(len(found))]


def fetched(caches: list[Path]) -> int:
    return sum(len(list((cache / "files").glob("[0-9a-f]*"))) for cache in caches)


def test_an_epoch_is_fetched_once_by_all_nodes(url: str, tmp_path: Path) -> None:
    def nodes(n: int, name: str) -> list[Path]:
        return [tmp_path / f"{name}-{n}-{i}" for i in range(n)]

    whole = epoch(url, nodes(1, "lanes"), LANES, "all")
    assert sorted(whole) == list(range(len(whole)))
    for n in (2, 4):
        caches = nodes(n, "lanes")
        assert epoch(url, caches, LANES, "all") == whole
        assert SHARDS <= fetched(caches) <= SHARDS + (n - 1) * SHARDS // WINDOW
    one = SamplerSettings(window=WINDOW)
    epoch(url, nodes(2, "one"), one, "all")
    assert fetched(nodes(2, "one")) == 2 * SHARDS


def test_a_resize_fetches_what_moves_alone(url: str, tmp_path: Path) -> None:
    caches = [tmp_path / str(i) for i in range(3)]
    two = epoch(url, caches[:2], LANES, "all")
    before = fetched(caches)
    assert epoch(url, caches, LANES, "all") == two
    # Of three nodes the first keeps a part of its half, the second gets a sixth, the third a third.
    moved = SHARDS * (1 / 6 + 1 / 3)
    assert fetched(caches) - before <= moved + 2 * 3 * SHARDS / WINDOW


def test_words_come_with_the_shards_of_the_lanes(url: str, tmp_path: Path) -> None:
    caches = [tmp_path / str(i) for i in range(4)]
    assert sorted(epoch(url, caches, LANES, "window")) == sorted(
        epoch(url, [tmp_path / "one"], LANES, "window")
    )
    assert not [path for cache in caches for path in cache.glob("merged-*")]
