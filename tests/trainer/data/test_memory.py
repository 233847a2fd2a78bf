"""What the data line costs: memory, threads and files stay flat; another worker is cheap."""

from __future__ import annotations

import gc
import multiprocessing
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from shards.dataset import open_dataset
from tests.shards.store.test_cache_limit import BATCH, ONE, PAIRS, SEED, SHARDS, put
from tests.trainer.data.test_batches import drawn
from trainer.data.loader import RankSlice, load_steps
from trainer.sections import LoaderSettings

MB = 2**20


@pytest.fixture(scope="module")
def remote(s3: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return put(tmp_path_factory.mktemp("memory") / "set", f"{s3}/memory/set", "memory", 0)


def steps_of(url: str, folder: Path, limit: int | None, total: int, workers: int) -> Any:
    data = open_dataset(url, folder, limit)
    sampler, part = data.sampler(ONE, SEED), RankSlice(0, 1, 1)
    loader = LoaderSettings(loader_workers=workers)
    return load_steps(data, sampler, drawn(data), part, sampler.start(), BATCH, total, loader)


def _epochs(url: str, folder: Path, epochs: int, queue: Any) -> None:
    """(private bytes, threads, files) of this process and its workers after each epoch."""
    size = max(f.size for f in open_dataset(url, folder).shards.files)
    per_epoch = SHARDS * PAIRS // BATCH
    for workers in (0, 1):
        # Half of the set stays, so every epoch downloads and evicts.
        steps = steps_of(url, folder, SHARDS // 2 * size, epochs * SHARDS * PAIRS, workers)
        found = []
        me = psutil.Process()
        for i, _ in enumerate(steps, 1):
            if i % per_epoch == 0 and i < epochs * per_epoch:
                gc.collect()
                tree = [me, *(p for p in me.children(recursive=True))]
                found.append(
                    (
                        sum(p.memory_full_info().uss for p in tree),
                        sum(p.num_threads() for p in tree),
                        sum(p.num_fds() for p in tree),
                    )
                )
        queue.put(found)


@pytest.mark.faults
def test_twenty_epochs_leave_nothing_behind(remote: str, tmp_path: Path) -> None:
    # A process of its own, which no other test has filled.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_epochs, args=(remote, tmp_path, 20, queue))
    process.start()
    for workers in (0, 1):
        found = queue.get(timeout=120)
        memory, threads, files = zip(*found[2:], strict=True)
        print(f"{workers} workers: {[round(m / MB, 1) for m in memory]} MB, {threads}, {files}")
        # An epoch's downloads are 0.3 MB, its batches 2 MB: a leak of either would show.
        assert memory[-1] - memory[0] < 3 * MB
        # Batches under way, connections and locks come and go; over 17 epochs a leak adds up.
        assert sum(threads[-5:]) <= sum(threads[:5]) + 5
        assert sum(files[-5:]) <= sum(files[:5]) + 5 * LoaderSettings().fetch_threads
    process.join()


def _with_workers(url: str, folder: Path, queue: Any) -> None:
    """Bytes of this process and its workers, shared pages counted once, with 1, 2, 3 workers."""
    total = []
    me = psutil.Process()
    for workers in (1, 2, 3):
        steps = steps_of(url, folder, None, 10**6, workers)
        for _ in range(20):
            next(steps)
        time.sleep(0.5)
        tree = [me, *me.children(recursive=True)]
        total.append(sum(p.memory_full_info().pss for p in tree))
        steps.close()
        deadline = time.monotonic() + 30
        while len(multiprocessing.active_children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    queue.put(total)


def test_another_loader_worker_costs_less_than_50_mb(remote: str, tmp_path: Path) -> None:
    """With data in the store, whose client is most of it; a batch is 5 kB here."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_with_workers, args=(remote, tmp_path, queue))
    process.start()
    one, two, three = queue.get(timeout=120)
    process.join()
    print(f"1, 2, 3 workers: {one / MB:.0f}, {two / MB:.0f}, {three / MB:.0f} MB")
    assert two - one < 50 * MB
    assert three - two < 50 * MB
