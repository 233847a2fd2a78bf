"""A resume late in an epoch costs what a start costs: nothing before it is planned or fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.dataset import open_dataset
from shards.format.build import BuildSettings, build
from shards.order.sampler import Sampler, SamplerState
from shards.order.settings import SamplerSettings
from tests.conftest import small_records
from tests.trainer.data.test_batches import drawn
from trainer.data.loader import RankSlice, load_steps
from trainer.sections import LoaderSettings

BATCH = 4


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_the_first_batch_fetches_its_window_and_no_more(
    s3: str, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3}/resume-cost-{share}"
    build(small_records(60), url, BuildSettings("cost", "test", images_per_shard=3))
    data = open_dataset(url, tmp_path / "cache")
    sampler = data.sampler(SamplerSettings(window=2), 8)
    (stream,) = sampler.streams
    begin = int(share * stream.pairs)
    plans: list[int] = []
    real = Sampler.slice

    def counted(*arguments: object) -> object:
        plans.append(1)
        return real(*arguments)

    monkeypatch.setattr(Sampler, "slice", counted)
    steps = load_steps(
        data,
        sampler,
        drawn(data),
        RankSlice(0, 1, 1),
        SamplerState(begin, (begin,), (0,), (begin // BATCH,)),
        BATCH,
        begin + BATCH,
        LoaderSettings(fetch_threads=2),
    )
    first = next(steps)
    assert not first.missing and first.batches[0].pairs == BATCH
    assert list(steps) == []
    order = sampler.order(0, 0)
    windows = {order.window_of(begin), order.window_of(begin + BATCH - 1)}
    expected = {
        data.shards.files[shard].sha256
        for w in windows
        for shard in order.shard_order[2 * w : 2 * w + 2].tolist()
    }
    fetched = {path.name for path in (tmp_path / "cache" / "files").iterdir()}
    assert fetched and fetched <= expected and len(expected) <= 4
    assert len(plans) == 1
