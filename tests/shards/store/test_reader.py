"""Reading shards: few descriptors however many there are, and nothing that has changed since."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shards.dataset import Dataset, open_dataset
from shards.errors import ShardError
from shards.format.build import BuildSettings, build
from shards.store import reader
from shards.store.cache import Verified
from shards.store.marks import identity_of
from shards.store.reader import Reader, Run
from tests.conftest import small_records, subprocess_environment
from tests.trainer.data.test_batches import NATURAL, run

MANY = 600


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of a shard an image."""
    folder = tmp_path_factory.mktemp("many") / "set"
    build(
        small_records(MANY, feature_dim=8), folder, BuildSettings("x", "test", images_per_shard=1)
    )
    return folder


# An epoch over all shards by a process that may open few files.
EPOCH = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from shards.dataset import open_dataset
from tests.trainer.data.test_batches import NATURAL, run
data = open_dataset(sys.argv[1], sys.argv[2])
assert len(run(data, NATURAL, 1, data.manifest.pairs)) == data.manifest.pairs
"""


def test_an_epoch_over_many_shards_with_few_descriptors(many: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EPOCH, str(many), str(tmp_path / "cache")],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def files_of(folder: Path, count: int) -> list[Path]:
    paths = [folder / str(i) for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 100)
    return paths


@pytest.mark.parametrize("evicts", [False, True])
def test_a_reader_keeps_few_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evicts: bool
) -> None:
    monkeypatch.setattr(reader, "_MOST", 5)
    paths = files_of(tmp_path, 50)
    asked = []

    def verified(shard: int) -> Verified:
        asked.append(shard)
        return Verified(paths[shard], identity_of(paths[shard].stat()), cached=evicts)

    before = len(os.listdir("/proc/self/fd"))
    files = Reader(verified, evicts)
    shards = np.random.default_rng(0).integers(0, 50, 300)
    out = np.full((300, 3), 99, dtype=np.uint8)
    at, size = np.arange(300) % 90, np.arange(300) % 4
    for _ in range(2):
        files.read_rows(shards, [Run(at, size, out)])
        wanted = [[s] * n + [0] * (3 - n) for s, n in zip(shards, size, strict=True)]
        assert (out == np.asarray(wanted)).all()
        assert len(os.listdir("/proc/self/fd")) - before <= 5 * (1 + evicts)
    assert len(asked) == len(set(shards.tolist()))  # once each, however often it is mapped
    files.keep(())
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_changes_is_verified_again(tmp_path: Path) -> None:
    paths = files_of(tmp_path, 1)
    asked = 0

    def verified(shard: int) -> Verified:
        nonlocal asked
        asked += 1
        return Verified(paths[shard], identity_of(paths[shard].stat()), cached=False)

    files = Reader(verified, False)

    def read() -> bytes:
        out = np.empty((1, 2), dtype=np.uint8)
        files.read_rows(np.zeros(1, np.int64), [Run(np.asarray([9]), np.asarray([2]), out)])
        return out.tobytes()

    assert read() == read() == b"\0\0" and asked == 1
    paths[0].write_bytes(b"x" * 100)
    assert read() == b"xx" and asked == 2
    other = tmp_path / "other"
    other.write_bytes(b"y" * 100)
    other.replace(paths[0])
    assert read() == b"yy" and asked == 3


def gather(data: Dataset) -> bytes:
    images = np.arange(len(data.index.image_objects))
    shape = len(images), data.manifest.schema.max_objects, data.manifest.schema.feature_dim
    features = np.zeros(shape, dtype=np.float16)
    data.gather_images(images, data.shard_of_image(images), features)
    return features.tobytes()


def test_a_tar_that_is_cut_while_it_is_used_is_an_error(many: Path, tmp_path: Path) -> None:
    """And not the end of the process by SIGBUS."""
    folder = tmp_path / "set"
    shutil.copytree(many, folder)
    data = open_dataset(str(folder), tmp_path / "cache")
    expected = gather(data)
    path = data.shards.path(7)
    content = path.read_bytes()
    with open(path, "r+b") as f:
        f.truncate(0)
    with pytest.raises(ShardError, match=f"{path} is damaged: 0 bytes instead of") as error:
        gather(data)
    assert error.value.shard == 7
    path.write_bytes(content)
    assert gather(data) == expected
    assert run(data, NATURAL, 1, 10)
