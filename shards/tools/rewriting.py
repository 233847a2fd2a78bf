"""Records of data sets that are there, written as shards: as a build of them would be.

Tars go to their place one by one, so that room is needed for one. The sentences are spooled, as the
tables need to know of all which sets there are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from shards.errors import DataError
from shards.format.answers import answer_index
from shards.format.build import write_words
from shards.format.check import check_record
from shards.format.manifest import Counts, Manifest, with_pages
from shards.format.members import members_of
from shards.format.publish import Delivery
from shards.format.record import QA_SOURCES, ImageRecord
from shards.format.sentences import Document, SentenceEncoder
from shards.format.shard_list import ShardInfo, ShardList
from shards.format.shard_writer import ShardWriter, WrittenTar, write_table
from shards.format.tokenizer import make_tokenizer
from shards.progress import Progress
from shards.tools.reading import Input


@dataclass(frozen=True)
class Rewriting:
    """How records are written."""

    name: str
    """Of the data set."""
    shard_bytes: int = 128 << 20
    """A shard is closed when its tar has as many."""
    images_per_shard: int | None = None
    """A shard is closed when it has as many, too."""


def bring(build: Delivery, path: Path) -> None:
    """Bring a staged file to its place; it takes no room here any more."""
    build.bring(path)
    path.unlink(missing_ok=True)


@dataclass
class SetWriter:
    """A data set that is being written, with vocabulary, answer table and schema of another. As in
    a build, some 200 bytes an image are in memory: where its members are."""

    build: Delivery
    folder: Path
    """For what is under way."""
    like: Input
    how: Rewriting
    images: int = 0
    max_objects: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    """Of each set."""
    answered: set[str] = field(default_factory=set)
    """Sets with answers."""
    tars: list[WrittenTar] = field(default_factory=list)
    _writer: ShardWriter | None = None

    def append(self, record: ImageRecord, text: bytes) -> None:
        """Add a record, whose JSON is `text`; DataError where it does not keep to the schema."""
        schema = self.like.manifest.schema
        check_record(record, schema)
        if self._writer is None:
            name = f"shard-{len(self.tars):06d}.tar"
            self._writer = ShardWriter(self.folder, name, members_of(schema))
        self._writer.append(record, text)
        with open(self._spool(len(self.tars)), "ab") as f:
            f.write(text.replace(b"\n", b" ") + b"\n")  # in JSON they are but spaces
        self.images += 1
        self.max_objects = max(self.max_objects, len(record.boxes))
        self.pairs.update(s.source for s in record.sentences)
        self.answered.update(s.source for s in record.sentences if s.answers)
        full = self._writer.size >= self.how.shard_bytes
        if full or self._writer.images == self.how.images_per_shard:
            self._close()

    def finish(self, progress: Progress) -> Manifest:
        """Write what is left but for the manifest, which it returns for `Delivery.commit`.
        DataError where no record was added."""
        if self._writer:
            self._close()
        if not self.tars:
            raise DataError(f"no image is left for {self.build.out}: choose others")
        schema = replace(self.like.manifest.schema, max_objects=self.max_objects)
        sources = sorted(self.pairs)
        encoder = SentenceEncoder(
            schema, sources, make_tokenizer(self.like.tokens), answer_index(self.like.answers)
        )
        infos: list[ShardInfo] = []
        for tar in self.tars:
            documents = self._documents(len(infos))
            # An answer that is not in the table was not before, either.
            infos.append(write_table(self.folder, tar, documents, encoder, lambda *_: None))
            self._spool(len(infos) - 1).unlink()
            bring(self.build, self.folder / infos[-1].table)
            progress("tables written", len(infos), len(self.tars))
        vocab, answers = write_words(self.folder, self.like.tokens, self.like.answers)
        questions = self.answered | QA_SOURCES
        manifest = with_pages(
            Manifest(
                name=self.how.name,
                extractor=self.like.manifest.extractor,
                schema=schema,
                sources=tuple(sources),
                question_sources=tuple(s for s in sources if s in questions),
                vocab=vocab,
                answers=answers,
                counts=Counts(self.images, self.pairs.total(), {s: self.pairs[s] for s in sources}),
                shards=ShardList.of(infos, sources),
            ),
            self.folder,
        )
        for file in (vocab, answers, *manifest.pages):
            bring(self.build, self.folder / file.file)
        return manifest

    def abort(self) -> None:
        """Let go of what is open."""
        if self._writer:
            self._writer.abort()

    def _close(self) -> None:
        assert self._writer
        self.tars.append(self._writer.close())
        self._writer = None
        bring(self.build, self.folder / self.tars[-1].name)

    def _spool(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.spool"

    def _documents(self, shard: int) -> Iterator[Document]:
        with open(self._spool(shard), "rb") as f:
            for line in f:
                yield json.loads(line)
