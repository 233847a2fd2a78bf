"""Who stops to read, or ends, breaks off what is fetched ahead: nothing half-written stays."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shards.dataset import Dataset, open_dataset
from shards.format.build import BuildSettings, build
from shards.store import objects
from tests.conftest import small_records
from tests.object_store import Fault, FaultProxy


class All:
    """A future that needs every shard, soon."""

    consumed = 0.0

    def now(self) -> NDArray[np.int64]:
        return np.zeros(0, dtype=np.int64)

    def due(self, shards: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.zeros(len(shards))

    def upcoming(self) -> Iterator[tuple[int, float, bool]]:
        return iter([(0, 1.0, True), (1, 2.0, True)])


@pytest.fixture
def data(
    s3: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Dataset]:
    """On a slow store: a shard takes 4 s."""
    url = f"{s3}/{tmp_path.name}"
    build(small_records(8), url, BuildSettings("slow", "test", images_per_shard=4))
    data = open_dataset(url, tmp_path / "cache")
    monkeypatch.setattr(objects, "_CHUNK", -(-int(data.manifest.shards.size.min()) // 20))
    proxy.begin(lambda request: Fault("delay", seconds=0.2))
    yield data
    proxy.begin()


def half(data: Dataset) -> list[Path]:
    return list(data.cache.rglob("*.tmp"))


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def begin(data: Dataset) -> None:
    data.shards.look_ahead(All(), 2)
    wait_for(lambda: len(half(data)) == 2)


def test_stop_breaks_off_downloads(data: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    before = {*threading.enumerate()}
    begin(data)
    data.shards.stop()
    assert not half(data) and not list((data.cache / "files").iterdir())
    assert "lxscale-fetch" not in {t.name for t in {*threading.enumerate()} - before}
    assert not caplog.records


def test_the_end_of_a_process_breaks_off_downloads(data: Dataset) -> None:
    child = multiprocessing.get_context("fork").Process(target=begin, args=(data,))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and not half(data)


def test_a_download_that_was_broken_off_is_no_failure_to_others(data: Dataset) -> None:
    begin(data)
    threading.Timer(0.3, data.shards._ahead.stop).start()
    # It waits for the lock of a download that is broken off meanwhile, and does it itself.
    path: list[Path] = []
    reader = threading.Thread(target=lambda: path.append(data.shards.path(0)))
    reader.start()
    reader.join(60)
    assert path and path[0].stat().st_size == data.manifest.shards[0].size
