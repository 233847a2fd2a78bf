"""The cache's promises: whole files or none, one download per node, damage healed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DataError
from shards.store import cache, locks, marks, objects
from shards.store.cache import local_file
from shards.store.stored import StoredFile
from tests.conftest import subprocess_environment
from tests.object_store import FaultProxy, first

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def remote(s3: str, tmp_path: Path) -> str:
    url = f"{s3}/{tmp_path.name}/object"
    objects.write_bytes(url, CONTENT)
    return url


def fetch(url: str, folder: Path) -> Path:
    return local_file(StoredFile(url, SHA256, len(CONTENT)), folder)


def test_fetched_once_and_verified_once(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    real = cache.hash_file
    monkeypatch.setattr(cache, "hash_file", lambda path: hashed.append(path) or real(path))
    path = fetch(remote, tmp_path)
    assert path.name == SHA256 and path.read_bytes() == CONTENT
    objects.delete(remote)
    assert fetch(remote, tmp_path) == path
    assert not hashed  # but on its way, and not again while it is unchanged
    assert [p.name for p in (tmp_path / "files").iterdir()] == [SHA256]
    os.utime(path)
    fetch(remote, tmp_path)
    assert len(hashed) == 1
    # After a start of the machine nothing is taken for written.
    monkeypatch.setattr(marks, "boot_id", lambda: "another")
    fetch(remote, tmp_path)
    fetch(remote, tmp_path)
    assert len(hashed) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_cached_file_is_set_aside_and_fetched_again(
    remote: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch(remote, tmp_path)
    bad = {"flip": b"\0" + CONTENT[1:], "cut": CONTENT[:-1], "empty": b""}[damage]
    path.write_bytes(bad)
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert path.with_suffix(".damaged").read_bytes() == bad
    assert "set aside" in caplog.text


def test_wrong_content_upstream_is_an_error_that_names_it(remote: str, tmp_path: Path) -> None:
    for bad in (b"\0" + CONTENT[1:], CONTENT[:-1]):
        objects.write_bytes(remote, bad)
        with pytest.raises(DataError, match=f"{remote} does not have the content"):
            fetch(remote, tmp_path)
        assert not (tmp_path / "files" / SHA256).exists()
    objects.delete(remote)
    with pytest.raises(DataError, match=f"{remote} does not exist"):
        fetch(remote, tmp_path)
    objects.write_bytes(remote, CONTENT)
    assert fetch(remote, tmp_path).read_bytes() == CONTENT


def test_dead_processes_leave_no_obstacle(remote: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "locks").mkdir()
    stale = tmp_path / "files" / f".{SHA256}.tmp"
    stale.write_bytes(CONTENT[:100])
    (tmp_path / "locks" / SHA256).touch()
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert not stale.exists()


def test_a_process_killed_while_it_fetches(s3: str, proxy: FaultProxy, tmp_path: Path) -> None:
    url = f"{s3}/killed/object"
    objects.write_bytes(url, CONTENT)
    proxy.begin(first(10**9, "503"))  # the child retries until it is killed
    child = subprocess.Popen(
        [sys.executable, "-c", WORKER, url, SHA256, str(len(CONTENT)), str(tmp_path)],
        env=subprocess_environment(),
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not proxy.requests:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert list((tmp_path / "files").glob("*.tmp")) + list((tmp_path / "files").glob(".*.tmp"))
    child.kill()
    child.wait()
    proxy.begin()
    assert fetch(url, tmp_path).read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "files").iterdir()] == [SHA256]


WORKER = """
import sys
from pathlib import Path
from shards.store import locks
from shards.store.cache import local_file
from shards.store.stored import StoredFile
file = StoredFile(sys.argv[1], sys.argv[2], int(sys.argv[3]))
path = local_file(file, Path(sys.argv[4]))
assert path.stat().st_size == int(sys.argv[3])
"""


def test_one_download_however_many_processes(s3: str, proxy: FaultProxy, tmp_path: Path) -> None:
    url = f"{s3}/crowd/object"
    objects.write_bytes(url, CONTENT)
    proxy.begin()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, url, SHA256, str(len(CONTENT)), str(tmp_path)],
            env=subprocess_environment(),
        )
        for _ in range(4)
    ]
    assert [c.wait() for c in children] == [0] * 4
    assert proxy.requests == 1
    assert [p.name for p in (tmp_path / "files").iterdir()] == [SHA256]


def test_local_files_are_verified_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = tmp_path / "shard.tar", tmp_path / "cache"
    path.write_bytes(CONTENT)
    assert fetch(str(path), folder) == path
    assert not (folder / "files").exists()
    with monkeypatch.context() as patch:
        patch.setattr(cache, "hash_file", lambda path: pytest.fail("hashed again"))
        assert fetch(str(path), folder) == path
    path.write_bytes(b"\0" + CONTENT[1:])
    with pytest.raises(DataError, match=f"{path} is damaged: sha256"):
        fetch(str(path), folder)
    path.write_bytes(CONTENT[1:])
    with pytest.raises(DataError, match=f"{path} is damaged: 299999 bytes instead of 300000"):
        fetch(str(path), folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{path} does not exist"):
        fetch(str(path), folder)
    monkeypatch.chdir(tmp_path)
    path.write_bytes(CONTENT)
    assert fetch("shard.tar", folder).is_absolute()


def test_a_marker_belongs_to_one_expected_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    fetch(str(path), tmp_path / "cache")
    with pytest.raises(DataError, match="is damaged"):
        local_file(StoredFile(str(path), "0" * 64, len(CONTENT)), tmp_path / "cache")


def test_an_unusable_cache_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    with pytest.raises(DataError, match="LXSCALE_CACHE"):
        fetch(str(path), tmp_path / "file")


def test_a_note_outlives_no_success_no_step_of_the_clock_and_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locks.locked(tmp_path, "x") as lock:
        asked = locks.now()
        locks.note(lock, locks.now(), "away")
        for clock in (0.0, 1e12):
            monkeypatch.setattr("time.time", lambda clock=clock: clock)
            assert locks.failed_since(lock, asked) == "away"
            assert locks.failed_since(lock, locks.now()) is None, "asked for after it"
        with monkeypatch.context() as patch:
            patch.setattr(locks, "boot_id", lambda: "another")
            assert locks.failed_since(lock, asked) is None
        locks.forget(lock)
        assert locks.failed_since(lock, asked) is None
        locks.note(lock, locks.now(), "away again")
        assert locks.failed_since(lock, asked) == "away again"
