"""A data set that is there: its words, and its shards one at a time, by hash.

Nothing goes through the node's cache: a tool reads each shard once. A shard is in memory while it
is read, and its table in a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.format.answers import load_answers
from shards.format.foreign import parse_document
from shards.format.manifest import Manifest, Schema, load_manifest
from shards.format.members import RECORD, members_of
from shards.format.record import (
    ImageRecord,
    Sentence,
    check_sentence,
    record_of,
    sentence_entry,
)
from shards.format.sentences import Document
from shards.format.table import Table, check_table, open_table
from shards.format.tokenizer import parse_vocab
from shards.progress import Progress
from shards.tools.copying import copy, read

REMEDY = "`lxscale shards verify` says what is damaged"


@dataclass(frozen=True)
class Input:
    """A data set that a tool reads."""

    url: str
    manifest: Manifest
    place: str
    """Where its files are."""
    tokens: list[str]
    answers: list[str]


def open_input(url: str, folder: Path) -> Input:
    """The data set at `url`; folder: for what is fetched of it. DataError where manifest,
    vocabulary or answer table is missing or damaged."""
    manifest = load_manifest(url)
    place = manifest.place(url)
    vocab = manifest.vocab.at(place)
    tokens = parse_vocab(bytes(read(vocab)), vocab.url)
    path = copy(manifest.answers.at(place), folder / "answers-of-input.json")
    answers = load_answers(path)
    path.unlink()
    found = len(tokens), len(answers)
    if found != (manifest.schema.vocab_size, manifest.answers.count):
        raise DataError(
            f"{url} has {found[0]} tokens and {found[1]} answers, not as its manifest: build it "
            "again"
        )
    return Input(url, manifest, place, tokens, answers)


@dataclass(frozen=True)
class Shard:
    """A shard of an input: its table, and the bytes of its tar, whose hashes were right."""

    number: int
    where: str
    """Its URL, for messages."""
    schema: Schema
    table: Table
    content: memoryview

    def __len__(self) -> int:
        return len(self.table.image_objects)

    def text(self, i: int) -> bytes:
        """The JSON of record i, as it is in the tar."""
        begin = int(self.table.offset[RECORD.name][i])
        return bytes(self.content[begin : begin + int(self.table.record_size[i])])

    def document(self, i: int) -> Document:
        """The same, parsed, with its sentences as a build would write them; DataError where
        something is missing."""
        try:
            document = parse_document(self.text(i))
            sentences = _sentences(document)
            first, end = self.table.image_sentences[i : i + 2].tolist()
            if len(sentences) != end - first:
                raise ValueError(f"{len(sentences)} sentences, and {end - first} in the table")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(i, error) from None
        return document | {"sentences": [sentence_entry(s) for s in sentences]}

    def record(self, i: int, document: Document) -> ImageRecord:
        """Record i, whose JSON is given; its arrays are copies."""
        n, found = int(self.table.image_objects[i]), dict[str, Any]()
        for member in members_of(self.schema):
            if member is RECORD:
                continue
            begin = int(self.table.offset[member.name][i])
            payload = bytes(self.content[begin : begin + n * member.object_bytes(self.schema)])
            found[member.name] = member.value(payload, n, self.schema)
        return record_of(document, _sentences(document), found)

    @property
    def foreign(self) -> bool:
        """Whether others wrote the tar."""
        return self.table.sample_offset is not None

    def _damaged(self, i: int, error: Exception) -> DataError:
        return DataError(f"{self.where}: record {i}: {error}; {REMEDY}")


def _sentences(document: Document) -> tuple[Sentence, ...]:
    return tuple(check_sentence(s, f"sentence {j}") for j, s in enumerate(document["sentences"]))


def read_table(data: Input, number: int, folder: Path) -> Table:
    """The table of a shard, checked; its file is gone, as it stays mapped."""
    info = data.manifest.shards[number]
    file = info.table_at(data.place)
    path = copy(file, folder / "table-of-input.safetensors")
    table = open_table(path)
    path.unlink()
    check_table(table, info, data.manifest, file.url)
    return table


def read_shard(data: Input, number: int, folder: Path, content: memoryview | None = None) -> Shard:
    """A shard; content: that of its tar, where it is at hand."""
    tar = data.manifest.shards[number].tar_at(data.place)
    table = read_table(data, number, folder)
    content = read(tar) if content is None else content
    return Shard(number, tar.url, data.manifest.schema, table, content)


def read_shards(
    data: Input, folder: Path, progress: Progress, wanted: Sequence[bool] | None = None
) -> Iterator[Shard]:
    """The shards one after the other, or those that are wanted."""
    count = len(data.manifest.shards)
    for number in range(count):
        if wanted is None or wanted[number]:
            yield read_shard(data, number, folder)
        progress("shards read", number + 1, count)


def mapped(path: Path) -> memoryview:
    """The content of a file of our own, which nobody else writes to."""
    return memoryview(np.memmap(path, dtype=np.uint8, mode="r"))  # type: ignore[arg-type]
