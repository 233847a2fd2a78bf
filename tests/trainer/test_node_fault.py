"""A fault of this machine is its own: no worker passes over a shard for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shards.dataset import open_dataset
from tests.ranks import run_ranks
from tests.shards.store.test_faults import small_disk
from tests.trainer.test_skip import remote, source, tree  # noqa: F401  fixtures


@pytest.mark.skipif(os.getuid() != 0, reason="needs the right to mount a file system")
def test_a_full_disk_skips_no_shard(
    remote: str,  # noqa: F811
    source: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data = open_dataset(str(source), tmp_path / "reference")
    with small_disk(1 << 20) as disk:
        cache = disk / "cache"
        open_dataset(remote, cache)
        # Room for one shard and a half.
        size = int(data.manifest.shards.size.max())
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free - size * 3 // 2))
        config = tree(remote, tmp_path, "run", "skip", cache=str(cache))
        errors = run_ranks(2, [(config, None, False)])
        assert errors and all("passed over" not in e for e in errors)
        assert any("No space left on device; make room" in e and str(disk) in e for e in errors)
        assert not list(cache.rglob("*.tmp"))
        (disk / "filler").unlink()
        assert not run_ranks(2, [(config, None, False)])
        assert (tmp_path / "run" / "checkpoints").is_dir()
