"""`lxscale cache`: what is there, whether it is whole, and what can go while others are at work."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.cli.main import main
from shards import inventory
from shards.dataset import Dataset, open_dataset
from shards.format.build import BuildSettings, build
from shards.format.index import LAYOUT
from shards.inventory import items
from tests.conftest import small_records


@pytest.fixture
def data(s3: str, tmp_path: Path) -> Dataset:
    """An opened remote data set, two of whose shards are in the cache."""
    url = f"{s3}/{tmp_path.name}"
    build(small_records(12), url, BuildSettings("cached", "test", images_per_shard=4))
    data = open_dataset(url, tmp_path / "cache")
    for shard in (0, 1):
        data.shards._fetch(shard, 0.0, lambda: None, threading.Event())
    return data


def run(data: Dataset, *command: str) -> int:
    return main(["cache", *command, "--cache", str(data.cache)])


def kinds(data: Dataset) -> dict[str, int]:
    found = [item.kind for item in items(data.cache)]
    return {kind: found.count(kind) for kind in found}


WHOLE = {"shard": 2, "table": 3, "index": 1}


def test_ls_counts_by_kind(data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "ls", "--files") == 0
    out = capsys.readouterr().out
    assert f"{data.cache}: 6 files" in out and kinds(data) == WHOLE
    sha256 = data.manifest.shards[0].sha256
    assert sum(sha256 in line for line in out.splitlines()) == 1
    assert main(["cache", "ls", "--cache", str(data.cache / "none")]) == 2
    assert "is no cache: it does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["shard", "table", "index"])
def test_verify_finds_a_flipped_bit_and_it_comes_anew(
    data: Dataset, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data, "verify") == 0
    assert "whole" in capsys.readouterr().out
    path = next(item.path for item in items(data.cache) if item.kind == kind)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run(data, "verify") == 1
    out = capsys.readouterr().out
    assert f"{path} is damaged" in out and "1 problems" in out
    assert not path.exists()
    again = open_dataset(data.url, data.cache)
    for shard in (0, 1):
        again.shards._fetch(shard, 0.0, lambda: None, threading.Event())
    assert run(again, "verify") == 0


def test_clean_removes_what_nothing_uses(data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    sha256 = data.manifest.shards[2].sha256
    left = data.cache / "files" / f".{sha256}.0a0b0c0d.tmp"
    left.write_bytes(b"half")
    (data.cache / "files" / f"{sha256}.damaged").write_bytes(b"bad")
    old = next(data.cache.glob("merged-*.safetensors"))
    (data.cache / old.name.replace(f"-{LAYOUT}.", f"-{LAYOUT - 1}.")).write_bytes(b"old")
    assert kinds(data) == WHOLE | {"old index": 1, "damaged": 1, "temporary": 1}
    assert run(data, "clean", "--dry-run") == 0
    assert "would remove 3" in capsys.readouterr().out and left.exists()
    assert run(data, "clean") == 0
    out = capsys.readouterr().out
    assert "removed 3" in out and left.name in out and kinds(data) == WHOLE


@pytest.mark.parametrize("limit", [None, 10**9])
def test_clean_spares_what_is_in_use_or_was_lately(
    data: Dataset, limit: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    used, other = (data.cache / "files" / data.manifest.shards[i].sha256 for i in (0, 1))
    (index,) = data.cache.glob("merged-*.safetensors")
    month = time.time() - 30 * 86400
    for path in (used, other, index):
        os.utime(path, (month, month))
    reading = open_dataset(data.url, data.cache, limit)
    del data
    image = np.zeros(1, dtype=np.int64)
    features = np.zeros((1, 10, 8), dtype=np.float16)

    def command(*words: str) -> str:
        assert run(reading, *words) == 0
        return capsys.readouterr().out

    reading.gather_images(image, image, features)
    assert "removed 1" in command("clean", "--older", "7")
    assert used.exists() and index.exists() and not other.exists()
    command("clean", "--all")
    assert {i.path for i in items(reading.cache)} == {used, index}
    assert command("ls").count("1 in use") == 2
    reading.gather_images(image, image, features)
    reading.shards.stop()
    command("clean", "--all")
    assert [i.path for i in items(reading.cache)] == [index]
    assert open_dataset(reading.url, reading.cache).manifest == reading.manifest


def test_a_disk_that_cannot_be_read_is_told_of_and_the_rest_is_checked(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, (bad, *_) = inventory.hash_file, [i.path for i in items(data.cache)]

    def hash_file(path: Path) -> str:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(inventory, "hash_file", hash_file)
    assert run(data, "verify") == 1
    assert f"{bad} cannot be looked at: Input/output error" in capsys.readouterr().out
    # Nor can anything be locked.
    shutil.rmtree(data.cache / "locks")
    (data.cache / "locks").touch()
    for command, status in ((["ls"], 0), (["clean", "--all"], 0), (["verify"], 1)):
        assert run(data, *command) == status
    assert kinds(data) == WHOLE


def test_what_is_not_the_caches_is_left(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "files").mkdir(parents=True)
    others = [cache / "thesis.tmp", cache / "picture.damaged", cache / "files" / "x.tmp"]
    for path in others:
        path.write_bytes(b"somebody's")
    os.mkfifo(cache / "files" / ("0" * 64))
    (cache / "files" / ("1" * 64)).mkdir()
    (cache / "tables").write_bytes(b"no folder")
    for command in (["ls"], ["verify"], ["clean", "--all"]):
        assert main(["cache", *command, "--cache", str(cache)]) == 0
    assert all(path.exists() for path in others)
