"""The data line under faults: of the network, of the store, of the node's disk, of its processes.

`make test` runs this with moto's server, `make test-faults` with Ceph's gateway.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest

from shards.dataset import Dataset, open_dataset
from shards.errors import DataError
from shards.format.build import BuildSettings, build
from shards.store import objects
from tests.conftest import files_of, small_records, subprocess_environment, upload_set
from tests.object_store import (
    BEFORE,
    IN_BODY,
    Fault,
    FaultProxy,
    ObjectStore,
    first_of_each,
    storm,
)
from tests.trainer.data.test_batches import NATURAL, run
from trainer.sections import LoaderSettings

BAD = "shard-000001.tar"  # the one that tests damage; its neighbours stay whole


# --- places -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _proxy(server: ObjectStore) -> Iterator[FaultProxy]:
    proxy = FaultProxy(server.endpoint)
    yield proxy
    proxy.down()


@pytest.fixture
def proxy(
    _proxy: FaultProxy, server: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """Before the server; clients in this process and its children take it, for 20 s at most."""
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", _proxy.url)
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", "20")
    _proxy.begin()
    yield _proxy
    _proxy.up()
    _proxy.begin()


@dataclass(frozen=True)
class Place:
    """A data set in a folder and, equal, on the store; `stream` is what training gets of it."""

    folder: Path
    url: str
    stream: list[dict[str, object]]

    @property
    def files(self) -> str:
        """Where all but the manifest is in the store."""
        return objects.join(self.url, files_of(self.folder).name)

    def shard(self, name: str = BAD) -> bytes:
        return (files_of(self.folder) / name).read_bytes()

    def put(self, content: bytes, name: str = BAD) -> None:
        objects.write_bytes(objects.join(self.files, name), content)


def stream(data: Dataset, workers: int = 0) -> list[dict[str, object]]:
    """Every pair of an epoch and a bit, as a model sees it."""
    return run(
        data, NATURAL, 1, data.manifest.pairs + 5, loader=LoaderSettings(loader_workers=workers)
    )


def digest(pairs: list[dict[str, object]]) -> str:
    return hashlib.sha256(repr(pairs).encode()).hexdigest()


LOADER = """
import sys
from shards.dataset import open_dataset
from tests.shards.store.test_faults import digest, stream
if __name__ == "__main__":
    print(digest(stream(open_dataset(sys.argv[1], sys.argv[2]), int(sys.argv[3]))))
"""


def stream_in_child(url: str, cache: Path, workers: int) -> str:
    """The digest of what a process with loader workers gets; they keep the environment of the
    first of them, so each test needs a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOADER, url, str(cache), str(workers)],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def make_set(folder: Path, seed: int = 0) -> None:
    settings = BuildSettings("faults", "test", images_per_shard=6)
    build(small_records(25, labels=True, feature_dim=64, seed=seed), folder, settings)


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("local")
    make_set(folder / "set")
    return Place(folder / "set", "", stream(open_dataset(str(folder / "set"), folder / "cache")))


@pytest.fixture(scope="session")
def remote(local: Place, server: ObjectStore) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in server.environment.items():
            patch.setenv(key, value)
        url = objects.join(server.bucket, "faults")
        upload_set(local.folder, url)
    return Place(local.folder, url, local.stream)


@pytest.fixture
def place(remote: Place, proxy: FaultProxy) -> Iterator[Place]:
    """The data set on the store, of which tests may change one shard."""
    yield remote
    proxy.up()
    proxy.begin()
    if objects.read_bytes(objects.join(remote.files, BAD)) != remote.shard():
        remote.put(remote.shard())


# --- the network and the store ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*BEFORE, *IN_BODY])
def test_a_fault_of_each_object_changes_nothing(
    place: Place, proxy: FaultProxy, tmp_path: Path, kind: str
) -> None:
    plan = first_of_each(1, kind)
    if kind in ("hang", "stall"):  # each costs two seconds
        slow = plan
        plan = lambda r: slow(r) if r.name == BAD else None  # noqa: E731
    proxy.begin(plan)
    assert stream(open_dataset(place.url, tmp_path / "cache")) == place.stream
    assert proxy.count("GET", BAD) >= (1 if kind == "delay" else 2)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.faults)])
@pytest.mark.parametrize("seed", [1, *(pytest.param(i, marks=pytest.mark.faults) for i in (2, 3))])
def test_a_storm_changes_nothing(
    place: Place, proxy: FaultProxy, tmp_path: Path, seed: int, workers: int
) -> None:
    often = [k for k in (*BEFORE, *IN_BODY) if k not in ("hang", "stall", "flip")]
    raging, flipping = storm(seed, 0.4, *often, *often, "hang", "stall"), first_of_each(1, "flip")
    # Content that is wrong but arrives in order is fetched again once: no more of it in a row.
    proxy.begin(lambda request: raging(request) or flipping(request))
    if workers:
        assert stream_in_child(place.url, tmp_path / "cache", workers) == digest(place.stream)
    else:
        assert stream(open_dataset(place.url, tmp_path / "cache")) == place.stream
    assert sum(raging(r) is not None for r in proxy.log) > 5


def test_an_outage_within_the_deadline_changes_nothing(
    place: Place, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.down()
    timer = threading.Timer(1.5, proxy.up)
    timer.start()
    assert stream(open_dataset(place.url, tmp_path / "cache")) == place.stream
    timer.join()


@pytest.mark.parametrize(
    "kind", ["down", "hang", *(pytest.param(k, marks=pytest.mark.faults) for k in ("stall", "503"))]
)
def test_an_outage_beyond_the_deadline_is_one_error(
    place: Place,
    proxy: FaultProxy,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = open_dataset(place.url, tmp_path / "cache")
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", "2")
    if kind == "down":
        proxy.down()
    else:
        proxy.begin(lambda request: Fault(kind))
    begin = time.monotonic()
    with pytest.raises(DataError, match=rf"{place.files}/shard-\d+.tar: .*gave up after"):
        stream(data)
    assert time.monotonic() - begin < 15
    proxy.up()
    proxy.begin()
    assert stream(data) == place.stream


def test_an_outage_costs_nothing_while_the_cache_has_all(
    place: Place, proxy: FaultProxy, tmp_path: Path
) -> None:
    assert stream(open_dataset(place.url, tmp_path / "cache")) == place.stream
    data = open_dataset(place.url, tmp_path / "cache")
    proxy.begin(lambda request: Fault("reset"))
    assert stream(data) == place.stream
    assert proxy.requests == 0


@pytest.mark.faults
def test_an_outage_costs_nothing_to_new_loader_workers(
    place: Place, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LXSCALE_STORE_DEADLINE", "2")
    assert stream(open_dataset(place.url, tmp_path / "cache")) == place.stream
    proxy.begin()
    open_dataset(place.url, tmp_path / "cache")
    opening = proxy.requests
    proxy.begin(lambda request: Fault("reset") if request.number >= opening else None)
    assert stream_in_child(place.url, tmp_path / "cache", 1) == digest(place.stream)


def test_a_flipped_bit_of_the_manifest_in_transit(
    place: Place, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.begin(first_of_each(1, "flip"))
    assert stream(open_dataset(place.url, tmp_path / "cache")) == place.stream


# --- damage -------------------------------------------------------------------------------------


def members(content: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=BytesIO(content)) as tar:
        return tar.getmembers()


def features(content: bytes) -> tarfile.TarInfo:
    """A member in the middle, of some size."""
    return max(members(content)[3:9], key=lambda m: m.size)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def end_of_members(content: bytes) -> int:
    last = members(content)[-1]
    return last.offset_data + -(-last.size // 512) * 512


# Most of these read as a clean, shorter archive in Python's tarfile.
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut between members": lambda c: c[: features(c).offset],
    "cut in a header": lambda c: c[: features(c).offset + 200],
    "cut in a payload": lambda c: c[: features(c).offset_data + features(c).size // 2],
    "empty": lambda c: b"",
    "no end blocks": lambda c: c[: end_of_members(c)],
    "bit of a header": lambda c: flip(c, features(c).offset + 130),
    "bit of a payload": lambda c: flip(c, features(c).offset_data + features(c).size // 2),
    "header of zeros": lambda c: (
        c[: features(c).offset] + bytes(512) + c[features(c).offset_data :]
    ),
    "bytes after the end": lambda c: c + bytes(512),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "another shard"])
def test_damage_in_the_store_is_an_error_until_it_is_mended(
    place: Place, proxy: FaultProxy, tmp_path: Path, damage: str
) -> None:
    good = place.shard()
    bad = DAMAGE[damage](good) if damage in DAMAGE else place.shard("shard-000002.tar")
    place.put(bad)
    data = open_dataset(place.url, tmp_path / "cache")
    names = [s.name for s in data.manifest.shards]
    if damage == "bytes after the end":  # what the manifest names is there and is all that is read
        assert stream(data) == place.stream
        return
    with pytest.raises(DataError, match=f"{place.files}/{BAD} does not have the content.*again"):
        data.shards.path(names.index(BAD))
    with pytest.raises(DataError, match=f"{place.files}/{BAD} does not have the content"):
        stream(data)
    for i in range(len(names)):  # the others are none the worse for it
        if names[i] != BAD:
            assert data.shards.path(i).read_bytes() == place.shard(names[i])
    place.put(good)
    assert stream(data) == place.stream


@pytest.mark.parametrize("damage", [*DAMAGE, "another shard"])
def test_damage_of_a_local_data_set_is_an_error_until_it_is_mended(
    local: Place, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(local.folder, folder)
    good = local.shard()
    bad = DAMAGE[damage](good) if damage in DAMAGE else local.shard("shard-000002.tar")
    path = files_of(folder) / BAD
    path.write_bytes(bad)
    data = open_dataset(str(folder), tmp_path / "cache")
    with pytest.raises(DataError, match=f"{path} is damaged: .*restore it"):
        stream(data)
    path.write_bytes(good)
    assert stream(data) == local.stream


@pytest.mark.parametrize("restored", [False, True], ids=["", "mtime restored"])
@pytest.mark.parametrize("damage", [*DAMAGE, "another shard"])
def test_damage_in_the_cache_between_runs_is_healed(
    place: Place,
    proxy: FaultProxy,
    tmp_path: Path,
    damage: str,
    restored: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = place.shard()
    bad = DAMAGE[damage](good) if damage in DAMAGE else place.shard("shard-000002.tar")
    data = open_dataset(place.url, tmp_path / "cache")
    assert stream(data) == place.stream
    sha256 = next(s.sha256 for s in data.manifest.shards if s.name == BAD)
    (path,) = (tmp_path / "cache").glob(f"files/{sha256}*")
    before = path.stat()
    path.write_bytes(bad)
    if restored:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    del data
    proxy.begin()
    assert stream(open_dataset(place.url, tmp_path / "cache")) == place.stream
    assert proxy.count("GET", BAD) == 1 and sha256 in caplog.text
    assert {r.name for r in proxy.log if r.method == "GET"} <= {BAD, "manifest.json"}


# --- the cache and its processes ----------------------------------------------------------------

READER = """
import os, sys
from shards.dataset import open_dataset
if len(sys.argv) > 3:
    # Imports what the other user may not read.
    open_dataset(sys.argv[1], sys.argv[4]).shards.path(0)
    os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[3]))
data = open_dataset(sys.argv[1], sys.argv[2])
for i in range(len(data.manifest.shards)):
    assert data.shards.path(i).stat().st_size == data.manifest.shards[i].size
"""


def reader(url: str, cache: Path, *user: str) -> subprocess.Popen[str]:
    """A process that opens the data set and all of its shards; as another user, if given (its
    number, and a cache to begin with)."""
    return subprocess.Popen(
        [sys.executable, "-c", READER, url, str(cache), *user],
        env=subprocess_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )


def settle() -> None:
    """Wait for the downloads that were under way when the reader stopped."""
    for thread in threading.enumerate():
        if thread.name == "lxscale-fetch":
            thread.join(30)
            assert not thread.is_alive()


def left_over(cache: Path) -> list[str]:
    """Files that are not whole."""
    return [str(p) for p in cache.rglob("*") if p.name.endswith(".tmp")]


@pytest.mark.faults
def test_eight_processes_and_one_download_of_each_file(
    place: Place, proxy: FaultProxy, tmp_path: Path
) -> None:
    # Time for all to ask for the same shard.
    proxy.begin(lambda r: Fault("delay", seconds=0.5) if r.name.endswith(".tar") else None)
    readers = [reader(place.url, tmp_path / "cache") for _ in range(8)]
    assert [(r.communicate()[1], r.returncode) for r in readers] == [("", 0)] * 8
    m = open_dataset(place.url, tmp_path / "cache").manifest
    names = [name for s in m.shards for name in (s.name, s.table)]
    assert {name: proxy.count("GET", name) for name in names} == dict.fromkeys(names, 1)
    assert not left_over(tmp_path / "cache")


def test_killed_while_it_downloads(place: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in (BAD, "shard-000002.tar", "shard-000003.tar"):  # three deaths in a row
        proxy.begin(lambda r, name=name: Fault("stall") if r.name == name else None)
        child = reader(place.url, cache)
        deadline = time.monotonic() + 60
        while not proxy.sent[name]:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert left_over(cache)
    proxy.begin()
    assert stream(open_dataset(place.url, cache)) == place.stream
    assert not left_over(cache)
    # What was whole before the last death was not fetched again.
    assert proxy.count("GET", BAD) == 0


def test_what_dead_processes_left_is_no_obstacle(
    place: Place, proxy: FaultProxy, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert stream(open_dataset(place.url, cache)) == place.stream
    for path in list((cache / "files").iterdir()):
        path.with_name(f".{path.name}.tmp").write_bytes(path.read_bytes()[:100])
        (cache / "locks" / path.name).touch()
        path.unlink()
    for path in list((cache / "verified").iterdir()):
        path.with_name(f".{path.name}.tmp").write_bytes(b"[")
        path.write_bytes(b"\xff\x00")
    assert stream(open_dataset(place.url, cache)) == place.stream
    shards = {s.sha256 for s in open_dataset(place.url, cache).manifest.shards}
    assert not [p for p in left_over(cache) if any(sha256 in p for sha256 in shards)]


def test_equal_names_in_two_data_sets_do_not_meet(
    place: Place, proxy: FaultProxy, tmp_path: Path
) -> None:
    make_set(tmp_path / "other", seed=1)
    other = f"{place.url}-other"
    upload_set(tmp_path / "other", other)
    expected = stream(open_dataset(str(tmp_path / "other"), tmp_path / "local cache"))
    first, second = (open_dataset(url, tmp_path / "cache") for url in (place.url, other))
    assert [s.name for s in first.manifest.shards] == [s.name for s in second.manifest.shards]
    assert stream(first) == place.stream and stream(second) == expected != place.stream
    assert stream(open_dataset(place.url, tmp_path / "cache")) == place.stream


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A file system of this many bytes."""
    folder = tempfile.mkdtemp(prefix="lxscale-disk-")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    try:
        if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    finally:
        shutil.rmtree(folder)  # a thread that was late may have written beneath the mount


def test_no_space_left(place: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    with small_disk(4 << 20) as disk:
        cache = disk / "cache"
        data = open_dataset(place.url, cache)
        filler = disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))
        with open(filler, "r+b") as f:  # some room: the write fails in the middle of a shard
            f.truncate(filler.stat().st_size - (len(place.shard()) // 2 // 4096 * 4096))
        with pytest.raises(DataError) as raised:
            stream(data)
        assert "No space left" in str(raised.value) and str(cache) in str(raised.value)
        assert "make room" in str(raised.value) and "LXSCALE_CACHE" in str(raised.value)
        settle()
        assert not left_over(cache)
        filler.unlink()
        assert stream(data) == place.stream
        settle()  # a thread under way would hold on to the disk
        del data


def test_no_space_for_the_tables(place: Place, proxy: FaultProxy) -> None:
    with small_disk(4 << 20) as disk:
        filler = disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))
        with pytest.raises(DataError, match=r"No space left .*LXSCALE_CACHE"):
            open_dataset(place.url, disk / "cache")
        filler.unlink()
        assert stream(open_dataset(place.url, disk / "cache")) == place.stream


NOBODY = "65534"


@pytest.mark.skipif(os.getuid() != 0, reason="needs the right to become another user")
def test_a_cache_that_cannot_be_written(place: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    user = (NOBODY, str(tmp_path / "own cache"))
    with tempfile.TemporaryDirectory(prefix="lxscale-cache-") as folder:
        os.chmod(folder, 0o755)
        for name in ("empty", "full"):
            (Path(folder) / name).mkdir(mode=0o755)
        child = reader(place.url, Path(folder) / "empty", *user)
        error = child.communicate()[1]
        assert child.returncode and f"{folder}/empty" in error
        assert "NodeError: cannot use" in error and "rights" in error and "LXSCALE_CACHE" in error
        # One that has all that is needed is as good as any.
        assert stream(open_dataset(place.url, Path(folder) / "full")) == place.stream
        child = reader(place.url, Path(folder) / "full", *user)
        assert (child.communicate()[1], child.returncode) == ("", 0)
