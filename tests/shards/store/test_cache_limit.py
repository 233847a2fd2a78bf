"""A byte limit on the node's cache: the same stream, few downloads, nothing beyond the limit."""

from __future__ import annotations

import contextlib
import fcntl
import math
import multiprocessing
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest

from shards.dataset import Dataset, DatasetSpec, open_dataset
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.format.record import ImageRecord, Sentence
from shards.order.lookahead import working_set
from shards.order.settings import SamplerSettings
from shards.store import cache, locks, objects
from shards.store.retry import Retry
from shards.store.room import Room
from tests.conftest import subprocess_environment, upload_set
from tests.object_store import FaultProxy, first
from tests.ranks import config_tree, run_ranks
from tests.trainer.data.test_batches import describe, drawn, run
from trainer.data.loader import RankSlice, load_steps
from trainer.evaluate import evaluation_bytes
from trainer.sections import LoaderSettings

SHARDS, PAIRS, BATCH = 10, 36, 4  # of the data set, of a shard, of a step
SEED = 4
TOTAL = 3 * SHARDS * PAIRS
ONE = SamplerSettings(window=1)
TWO = SamplerSettings(window=2)
THREE = SamplerSettings(window=3)  # leaves a window of one at an epoch's end
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.shards.store.test_cache_limit"])


def even_records(n: int, seed: int) -> list[ImageRecord]:
    """Records of equal size, so that a limit holds a number of shards, whichever they are."""
    rng = np.random.default_rng(seed)
    return [
        ImageRecord(
            image=f"{i:04d}.png",
            width=640,
            height=480,
            boxes=np.tile(np.asarray([0.25, 0.25, 0.75, 0.75], np.float32), (3, 1)),
            features=rng.random((3, 64)).astype(np.float16),
            sentences=(
                Sentence("a red line", "coco_cap"),
                Sentence("a blue line", "coco_cap"),
                Sentence("what is it", "vqa", {"line": 1.0}, 1000 + i),
            ),
        )
        for i in range(n)
    ]


def put(folder: Path, url: str, name: str, seed: int) -> str:
    settings = BuildSettings(name, "test", images_per_shard=PAIRS // 3)
    build(even_records(SHARDS * PAIRS // 3, seed), folder, settings)
    upload_set(folder, url)
    return url


@pytest.fixture(scope="module", autouse=True)
def _loader_workers_know_the_store(s3: str) -> None:
    """The server that they are forked from keeps the environment that it started with."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    CONTEXT.set_forkserver_preload(["tests.shards.store.test_cache_limit"])


@pytest.fixture(scope="module")
def remote(s3: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return put(tmp_path_factory.mktemp("one") / "set", f"{s3}/evict/one", "one", 0)


@pytest.fixture(scope="module")
def other(s3: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return put(tmp_path_factory.mktemp("two") / "set", f"{s3}/evict/two", "two", 1)


@pytest.fixture(scope="module")
def expected(remote: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """The streams without a limit, by window."""
    data = open_dataset(remote, tmp_path_factory.mktemp("unlimited"))
    return {s.window: run(data, s, 1, TOTAL, global_batch=BATCH) for s in (ONE, TWO, THREE)}


def shard_size(data: Dataset) -> int:
    """The largest; of the others none is so much smaller that one more would fit."""
    sizes = [f.size for f in data.shards.files]
    assert len(sizes) == SHARDS and min(sizes) * (SHARDS + 1) > max(sizes) * SHARDS
    return max(sizes)


def limited(url: str, folder: Path, shards: int) -> Dataset:
    size = shard_size(open_dataset(url, folder))
    return open_dataset(url, folder, shards * size)


def needed(data: Dataset, settings: SamplerSettings, workers: int = 0) -> int:
    """The working set that load_steps asks for, in shards."""
    sizes = np.ones(SHARDS, dtype=np.int64)
    return working_set(data.sampler(settings, SEED), sizes, BATCH * (2 + workers * 3))


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[Callable[[], int]]:
    """The most bytes that files/ held while the block ran."""
    most, over = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not over.is_set():
            # Nothing is created or evicted meanwhile; what is renamed keeps its inode.
            with locks.locked(folder, "room"):
                found = {}
                for path in (folder / "files").glob("*"):
                    with contextlib.suppress(FileNotFoundError):
                        status = path.stat()
                        found[status.st_ino] = status.st_size
            most = max(most, sum(found.values()))
            time.sleep(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: most
    finally:
        over.set()
        thread.join()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs of the shards that this process downloads, in order."""
    seen: list[str] = []
    real = objects.download

    def download(url: str, *arguments: Any, **options: Any) -> str:
        if url.endswith(".tar"):
            seen.append(url)
        return real(url, *arguments, **options)

    monkeypatch.setattr(objects, "download", download)
    return seen


# --- the stream and the limit -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "workers"), [(ONE, 0), (ONE, 2), (TWO, 0), (TWO, 2), (THREE, 0)]
)
def test_the_stream_is_the_same_under_the_smallest_limit(
    remote: str,
    tmp_path: Path,
    expected: dict[int, list[Any]],
    settings: SamplerSettings,
    workers: int,
) -> None:
    data = open_dataset(remote, tmp_path)
    data = limited(remote, tmp_path, needed(data, settings, workers))
    assert data.shards.limit is not None
    assert data.shards.limit < SHARDS * shard_size(data)
    with watched(tmp_path) as most:
        loader = LoaderSettings(loader_workers=workers)
        found = run(data, settings, 1, TOTAL, loader=loader, global_batch=BATCH)
    assert found == expected[settings.window]
    assert data.shards.limit / 2 < most() <= data.shards.limit


def _rank(queue: Any, barrier: Any, rank: int, world: int, arguments: tuple[Any, ...]) -> None:
    places, folder, limit, settings, workers, total = arguments
    data = open_dataset(places, folder, limit)
    sampler = data.sampler(settings, SEED)
    part = RankSlice(rank, world, 1)
    found = []
    loader = LoaderSettings(loader_workers=workers, fetch_threads=2)
    for loaded in load_steps(
        data, sampler, drawn(data), part, sampler.start(), BATCH, total, loader
    ):
        assert not loaded.missing, loaded.missing
        found.append([p for batch in loaded.batches for p in describe(batch)])
        barrier.wait(60)  # as the gradients' all-reduce does
    queue.put((rank, found))


def start_ranks(
    world: int, places: tuple[DatasetSpec, ...], folder: Path, *rest: Any
) -> tuple[Any, Any, list[Any]]:
    queue, barrier = CONTEXT.Queue(), CONTEXT.Barrier(world)
    arguments = (places, folder, *rest)
    ranks = [
        CONTEXT.Process(target=_rank, args=(queue, barrier, r, world, arguments))
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    return queue, barrier, ranks


def collect(started: tuple[Any, Any, list[Any]]) -> list[Any]:
    queue, _, ranks = started
    found = dict(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    return [
        p for step in zip(*(found[r] for r in sorted(found)), strict=True) for s in step for p in s
    ]


def test_ranks_that_share_a_cache_keep_to_one_limit(
    remote: str, tmp_path: Path, expected: dict[int, list[Any]]
) -> None:
    data = open_dataset(remote, tmp_path)
    limit = needed(data, ONE, 1) * shard_size(data)
    with watched(tmp_path) as most:
        found = collect(start_ranks(3, data.specs, tmp_path, limit, ONE, 1, TOTAL))
    assert found == expected[1]
    assert most() <= limit


def test_runs_on_different_data_share_a_cache(
    remote: str, other: str, tmp_path: Path, expected: dict[int, list[Any]]
) -> None:
    """Neither knows the other's future, and none is displaced from what it reads."""
    one, two = open_dataset(remote, tmp_path), open_dataset(other, tmp_path)
    limit = 2 * needed(one, ONE) * max(shard_size(one), shard_size(two))
    with watched(tmp_path) as most:
        started = [start_ranks(1, d.specs, tmp_path, limit, ONE, 0, TOTAL) for d in (one, two)]
        found = [collect(s) for s in started]
    assert found[0] == expected[1]
    assert found[1] == run(open_dataset(other, tmp_path / "own"), ONE, 1, TOTAL, global_batch=BATCH)
    assert most() <= limit


@pytest.mark.faults
def test_validation_keeps_to_the_limit_too(remote: str, other: str, tmp_path: Path) -> None:
    data, validation = open_dataset(remote, tmp_path), open_dataset(other, tmp_path)
    need = needed(data, ONE) * shard_size(data) + evaluation_bytes(validation, BATCH)
    tree = config_tree(
        Path(remote),
        tmp_path,
        "run",
        data={"train": remote, "validation": other, "cache": str(tmp_path)},
        sampler={"window": 1},
        train={"steps": 60, "global_batch": BATCH, "validation_batch": BATCH, "validate_every": 30},
    )
    tree["data"]["cache_limit_gb"] = (need - 1) / 2**30
    (error,) = run_ranks(1, [(tree, None, False)])
    assert "is below the working set" in error
    tree["data"]["cache_limit_gb"] = need / 2**30
    with watched(tmp_path) as most:
        assert not run_ranks(2, [(tree, None, False)])
    assert most() <= need


def test_a_limit_below_the_working_set_is_refused_at_the_start(
    remote: str, tmp_path: Path, downloads: list[str]
) -> None:
    data = open_dataset(remote, tmp_path)
    need = needed(data, TWO)
    limit = need * min(f.size for f in data.shards.files) - 1
    data = open_dataset(remote, tmp_path, limit)
    with pytest.raises(DataError, match=r"cache limit of .* is below the working set") as error:
        run(data, TWO, 1, TOTAL, global_batch=BATCH)
    for word in (f"{limit:,}", "data.cache_limit_gb", "sampler.window"):
        assert word in str(error.value)
    told = re.search(r"data.cache_limit_gb to (\S+) or more", str(error.value))
    assert told and limit < float(told[1]) * 2**30 < 1.02 * limit
    assert not downloads
    # The remedies help, and local data needs no room.
    assert len(run(data, ONE, 1, BATCH, global_batch=BATCH)) == BATCH


def test_local_data_needs_no_room(tmp_path: Path) -> None:
    build(even_records(24, 0), tmp_path / "set", BuildSettings("x", "test", images_per_shard=12))
    data = open_dataset(str(tmp_path / "set"), tmp_path / "cache", 1)
    assert len(run(data, ONE, 1, 100, global_batch=BATCH)) == 100


def test_a_lower_limit_shrinks_what_an_earlier_run_left(remote: str, tmp_path: Path) -> None:
    run(open_dataset(remote, tmp_path), ONE, 1, SHARDS * PAIRS, global_batch=BATCH)
    files = list((tmp_path / "files").iterdir())
    assert len(files) == SHARDS
    data = limited(remote, tmp_path, 4)
    run(data, ONE, 1, BATCH, global_batch=BATCH)
    assert len(list((tmp_path / "files").iterdir())) <= 4


# --- how often a shard is downloaded ------------------------------------------------------------


def windows_of(data: Dataset, settings: SamplerSettings, epochs: int) -> list[list[int]]:
    sampler = data.sampler(settings, SEED)
    assert len(sampler.streams) == 1
    out = []
    for epoch in range(epochs):
        order = sampler.order(0, epoch).shard_order.tolist()
        out += [order[i : i + settings.window] for i in range(0, len(order), settings.window)]
    return out


def reference(windows: list[list[int]], capacity: int, optimal: bool) -> Counter[int]:
    """Downloads of each shard where a window and the one before it must be there together, as a
    step may span both: Belady's choice of what goes, or the one used longest ago."""
    there: set[int] = set()
    used: dict[int, int] = {}
    count: Counter[int] = Counter()
    for now, window in enumerate(windows):
        held = {*window, *(windows[now - 1] if now else ())}

        def last_choice(shard: int, now: int = now) -> int:
            if not optimal:
                return -used[shard]
            later = (k for k in range(now + 1, len(windows)) if shard in windows[k])
            return next(later, len(windows))

        for shard in window:
            if shard not in there:
                if len(there) == capacity:
                    there.remove(max(there - held, key=last_choice))
                there.add(shard)
                count[shard] += 1
            used[shard] = now
    return count


@pytest.mark.parametrize(("settings", "capacity"), [(ONE, 3), (ONE, 6), (TWO, 5), (TWO, 8)])
def test_downloads_are_as_few_as_any_choice_could_make_them(
    remote: str, tmp_path: Path, downloads: list[str], settings: SamplerSettings, capacity: int
) -> None:
    epochs = 5
    data = limited(remote, tmp_path, capacity)
    run(data, settings, 1, epochs * SHARDS * PAIRS, global_batch=BATCH)
    windows = windows_of(data, settings, epochs)
    best = reference(windows, capacity, optimal=True)
    oldest = reference(windows, capacity, optimal=False)
    assert len(downloads) == best.total() < oldest.total()


def test_a_limit_that_holds_everything_costs_one_download_each(
    remote: str, tmp_path: Path, downloads: list[str]
) -> None:
    data = limited(remote, tmp_path, SHARDS)
    run(data, ONE, 1, TOTAL, global_batch=BATCH)
    assert sorted(downloads) == sorted(f.url for f in data.shards.files)


# --- faults -------------------------------------------------------------------------------------


WORKER = """
import sys
from pathlib import Path
from shards.store.cache import Budget, local_file
from shards.store.room import Room
from shards.store.stored import StoredFile
url, sha256, size, folder, limit = sys.argv[1:]
room = Room(Path(folder), int(limit), lambda names: [-1.0 for _ in names])
local_file(StoredFile(url, sha256, int(size)), Path(folder), budget=Budget(room))
"""


def test_what_a_killed_process_reserved_does_not_count_for_ever(
    remote: str, proxy: FaultProxy, tmp_path: Path, expected: dict[int, list[Any]]
) -> None:
    data = open_dataset(remote, tmp_path)
    capacity = needed(data, ONE)
    data = limited(remote, tmp_path, capacity)
    limit = data.shards.limit
    proxy.begin(first(10**9, "503"))  # the children retry until they are killed
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, f.url, f.sha256, str(f.size), tmp_path, str(limit)],
            env=subprocess_environment(),
            stderr=subprocess.DEVNULL,
        )
        for f in data.shards.files[-capacity:]
    ]
    deadline = time.monotonic() + 60
    while proxy.requests < capacity or len(list((tmp_path / "files").iterdir())) < capacity:
        assert all(c.poll() is None for c in children) and time.monotonic() < deadline
        time.sleep(0.05)
    for child in children:
        child.kill()
        child.wait()
    assert sum(p.stat().st_size for p in (tmp_path / "files").glob(".*.tmp")) > limit * 0.9
    proxy.begin()
    with watched(tmp_path) as most:
        assert run(data, ONE, 1, TOTAL, global_batch=BATCH) == expected[1]
    assert most() <= limit
    assert not list((tmp_path / "files").glob(".*.tmp"))


def test_files_in_use_by_others_are_waited_for_and_then_named(remote: str, tmp_path: Path) -> None:
    data = limited(remote, tmp_path, 2)
    first, second, third = data.shards.files[:3]
    for file in (first, second):
        cache.local_file(file, tmp_path)
    held = [locks.open_shared(tmp_path / "files" / f.sha256) for f in (first, second)]
    room = cache.Budget(Room(tmp_path, data.shards.limit, lambda names: [math.inf for _ in names]))

    def get() -> Path:
        return cache.local_file(third, tmp_path, budget=room, retry=Retry(deadline=2))

    with pytest.raises(DataError, match=r"is full: its limit of .* data\.cache_limit_gb"):
        get()
    threading.Timer(0.5, locks.unlock, held[1:]).start()
    assert get().exists()
    assert (tmp_path / "files" / first.sha256).exists()
    assert not (tmp_path / "files" / second.sha256).exists()
    for f in held:
        f.close()


def _until_killed(data_url: str, folder: Path, limit: int, start: Any, queue: Any) -> None:
    data = open_dataset(data_url, folder, limit)
    steps = begin(data, 10**6, LoaderSettings(loader_workers=2, loader_start=start))
    next(steps)
    queue.put([p.pid for p in psutil.Process().children(recursive=True)])
    for _ in steps:
        time.sleep(0.05)


@pytest.mark.parametrize(
    "start", ["forkserver", *(pytest.param(s, marks=pytest.mark.faults) for s in ("fork", "spawn"))]
)
def test_a_killed_process_takes_its_workers_and_their_locks_along(
    remote: str, tmp_path: Path, start: str
) -> None:
    data = limited(remote, tmp_path, needed(open_dataset(remote, tmp_path), ONE, 2))
    # By spawn: a server of the killed process's own, if it needs one.
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (remote, tmp_path, data.shards.limit, start, queue)
    killed = context.Process(target=_until_killed, args=arguments)
    killed.start()
    workers = queue.get(timeout=60)
    assert len(workers) >= 2
    killed.kill()
    killed.join()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers))
    for path in (tmp_path / "files").iterdir():
        with open(path, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- ahead of need ------------------------------------------------------------------------------


def begin(data: Dataset, total: int, loader: LoaderSettings) -> Generator[Any, None, None]:
    sampler, part = data.sampler(ONE, SEED), RankSlice(0, 1, 1)
    return load_steps(data, sampler, drawn(data), part, sampler.start(), BATCH, total, loader)


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fetching() -> int:
    return sum(t.name == "lxscale-fetch" for t in threading.enumerate())


def test_shards_come_in_the_order_of_need_and_no_more_than_the_run_needs(
    remote: str, tmp_path: Path, downloads: list[str]
) -> None:
    data = open_dataset(remote, tmp_path)
    order = [data.shards.files[s].url for (s,) in windows_of(data, ONE, 1)]
    steps = begin(data, 6 * PAIRS, LoaderSettings(fetch_threads=1))
    next(steps)
    wait_until(lambda: len(downloads) >= 6)
    time.sleep(0.5)
    # The first step itself asks for the first one, while the thread may be at the second.
    assert sorted(downloads[:2]) == sorted(order[:2]) and downloads[2:] == order[2:6]
    assert len(list(steps)) == 6 * PAIRS // BATCH - 1
    assert len(downloads) == 6


def test_under_a_limit_only_free_room_is_filled_far_ahead(
    remote: str, tmp_path: Path, downloads: list[str]
) -> None:
    data = limited(remote, tmp_path, 5)
    order = [data.shards.files[s].url for (s,) in windows_of(data, ONE, 1)]
    steps = begin(data, TOTAL, LoaderSettings(fetch_threads=2))
    next(steps)
    wait_until(lambda: len(downloads) >= 5)
    time.sleep(0.5)
    assert sorted(downloads) == sorted(order[:5])
    steps.close()


def test_an_outage_ahead_of_need_does_no_harm(
    remote: str, proxy: FaultProxy, tmp_path: Path, expected: dict[int, list[Any]]
) -> None:
    data = open_dataset(remote, tmp_path)
    steps = begin(data, TOTAL, LoaderSettings(fetch_threads=2))
    found = describe(next(steps).batches[0])
    proxy.begin(first(10**9, "503"))
    wait_until(lambda: proxy.requests >= 3 or fetching() == 0)
    proxy.begin()
    for loaded in steps:
        found += describe(loaded.batches[0])
    assert found == expected[1]


def test_a_missing_shard_is_not_asked_for_over_and_over(
    s3: str,
    tmp_path: Path,
    downloads: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = put(tmp_path / "set", f"{s3}/evict/missing", "missing", 2)
    data = open_dataset(url, tmp_path)
    shards = [s for (s,) in windows_of(data, ONE, 1)]
    gone = data.shards.files[shards[2]].url
    objects.delete(gone)
    steps = begin(data, TOTAL, LoaderSettings(fetch_threads=2))
    next(steps)
    wait_until(lambda: len(set(downloads)) == SHARDS)
    time.sleep(2)
    assert downloads.count(gone) <= 3
    assert caplog.text.count("not fetched ahead") == 1
    for _ in range(2 * PAIRS // BATCH - 1):
        assert not next(steps).missing
    missing = next(steps).missing
    assert missing and missing.shard == shards[2] and gone in missing.message


def own_threads() -> int:
    """Without those in which asyncio looks names up, some more when it likes."""
    return sum(not t.name.startswith("asyncio_") for t in threading.enumerate())


@pytest.mark.parametrize("capacity", [None, 4])
def test_threads_and_files_go_with_the_loader(
    remote: str, tmp_path: Path, capacity: int | None
) -> None:
    data = limited(remote, tmp_path, capacity) if capacity else open_dataset(remote, tmp_path)
    process = psutil.Process()

    def once(steps: int) -> None:
        loader = begin(data, TOTAL, LoaderSettings())
        for _ in range(steps):
            next(loader)
        loader.close()

    once(30)
    wait_until(lambda: fetching() == 0)
    threads, files = own_threads(), process.num_fds()
    for i in range(40):
        once(1 + i % 30)
        assert fetching() <= 2 * LoaderSettings().fetch_threads  # the last one's may still end
    wait_until(lambda: fetching() == 0)
    assert own_threads() <= threads
    # s3fs keeps connections to the store open, not more than downloads at once.
    assert process.num_fds() <= files + LoaderSettings().fetch_threads


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_workers_fetch_by_themselves_however_they_start(
    remote: str,
    tmp_path: Path,
    expected: dict[int, list[Any]],
    start: Literal["fork", "spawn", "forkserver"],
) -> None:
    """The parent has used the store, and still has threads at it when the workers start."""
    data = limited(remote, tmp_path, 9)
    before = begin(data, TOTAL, LoaderSettings())
    next(before)
    found = run(
        data,
        ONE,
        1,
        TOTAL // 2,
        loader=LoaderSettings(loader_workers=2, loader_start=start),
        global_batch=BATCH,
    )
    assert found == expected[1][: TOTAL // 2]
    before.close()
