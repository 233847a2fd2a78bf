"""One shard: its tar, record by record, then its table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards.format.arrays import save_arrays
from shards.format.members import RECORD, Member
from shards.format.record import ImageRecord, record_key
from shards.format.sentences import Document, SentenceEncoder, Unknown
from shards.format.shard_list import ShardInfo
from shards.format.table import member_columns
from shards.format.tar import TarWriter
from shards.store.stored import hash_file


@dataclass
class WrittenTar:
    """A tar and its images; one entry an image in each list."""

    name: str
    objects: list[int] = field(default_factory=list)
    record_size: list[int] = field(default_factory=list)
    offset: dict[str, list[int]] = field(default_factory=dict)
    """By member."""
    size: int = 0
    sha256: str = ""


class ShardWriter:
    """A tar that is being written."""

    def __init__(self, folder: Path, name: str, members: list[Member]) -> None:
        self.written = WrittenTar(name, offset={m.name: [] for m in members})
        self._members = members
        self._tar = TarWriter(folder / name)

    @property
    def images(self) -> int:
        return len(self.written.objects)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._tar.size

    def append(self, record: ImageRecord, text: bytes) -> None:
        """Add a record, whose JSON is `text`."""
        key = record_key(record.image)
        for member in self._members:
            payload = text if member is RECORD else member.payload(record)
            offset = self._tar.add(f"{key}.{member.suffix}", payload)
            self.written.offset[member.name].append(offset)
        self.written.objects.append(len(record.boxes))
        self.written.record_size.append(len(text))

    def close(self) -> WrittenTar:
        self.written.sha256 = self._tar.finish()
        self.written.size = self._tar.size
        return self.written

    def abort(self) -> None:
        self._tar.abort()


def table_name(tar: str) -> str:
    """Of the table of a shard."""
    return f"{tar.removesuffix('.tar')}.table.safetensors"


def write_table(
    folder: Path,
    tar: WrittenTar,
    documents: Iterable[Document],
    encoder: SentenceEncoder,
    unknown: Unknown,
) -> ShardInfo:
    """Write the table of a tar, whose records' JSON are `documents`, beside it."""
    arrays = {
        **member_columns(tar.objects, tar.record_size, tar.offset),
        **encoder.arrays(documents, unknown),
    }
    path = folder / table_name(tar.name)
    save_arrays(path, arrays)
    pairs = np.bincount(arrays["sentence_source"], minlength=len(encoder.sources)).tolist()
    return ShardInfo(
        name=tar.name,
        size=tar.size,
        sha256=tar.sha256,
        table=path.name,
        table_size=path.stat().st_size,
        table_sha256=hash_file(path),
        images=len(arrays["image_objects"]),
        pairs=len(arrays["sentence_source"]),
        pairs_per_source={s: n for s, n in zip(encoder.sources, pairs, strict=True) if n},
    )
