"""Files as columns are the same files, and are found by their hash."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from shards.store.stored import StoredFile, StoredFiles


def test_columns_of_files() -> None:
    hashes = [hashlib.sha256(bytes([i % 40])).digest() for i in range(50)]
    hashes[7] = hashes[7][:30] + b"\0\0"  # as one in 65,536 ends
    files = StoredFiles(
        [("/data/one", 20), ("s3://bucket/two", 50)],
        np.asarray([f"shard-{i}.tar" for i in range(50)], dtype=np.bytes_),
        np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(50, 32),
        np.arange(50),
    )
    assert files[19] == StoredFile("/data/one/shard-19.tar", hashes[19].hex(), 19)
    assert files[20] == StoredFile("s3://bucket/two/shard-20.tar", hashes[20].hex(), 20)
    assert files[-1] == list(files)[-1] and files[3:5] == [files[3], files[4]]
    with pytest.raises(IndexError):
        files[50]
    assert files.remote.tolist() == [f.remote for f in files]
    for i, digest in enumerate(hashes):
        same = [j for j, other in enumerate(hashes) if other == digest]
        assert files.numbers(digest.hex()) == same and i in same
    assert files.numbers("00" * 32) == []
