"""Building a data set: image records → shards, tables, vocabulary, answers, manifest.

One pass over the records writes the tars and spools the sentences; vocabulary and answer table are
then given or made from the spool, and the tables follow. Everything is made in a staging folder
and published at the end, manifest last: an interrupted build leaves no file under its final name.
The same records and settings give the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from shards.errors import DataError
from shards.format.answers import answer_index, count_answers
from shards.format.arrays import save_arrays
from shards.format.check import check_record
from shards.format.manifest import MANIFEST, Counts, FileInfo, Manifest, Schema, with_pages
from shards.format.members import RECORD, Member, members_of
from shards.format.record import QA_SOURCES, ImageRecord, Report, record_json, record_key
from shards.format.sentences import Document, SentenceEncoder
from shards.format.shard_list import ShardInfo, ShardList
from shards.format.staging import check_free, publish, staging_folder
from shards.format.table import member_columns
from shards.format.tar import TarWriter
from shards.format.tokenizer import load_vocab, make_tokenizer, train_vocab
from shards.progress import Progress, no_progress
from shards.store.stored import hash_file

VOCAB, ANSWERS = "vocab.txt", "answers.json"
# Records whose layouts are compared before the first is written, where bad ones are left out; they
# are in memory at one time.
_VOTERS = 100
# Names of a data set's files but for the manifest; many a WebDataset has some of them, too.
_OWNED = re.compile(
    r"shard-\d{6}\.(tar|table\.safetensors)|shards-\d{6}\.safetensors|vocab\.txt|answers\.json"
)


@dataclass(frozen=True)
class BuildSettings:
    """What a build is asked for."""

    name: str
    """Recorded in the manifest."""
    extractor: str
    """What made the features, recorded, too: those of two extractors are no substitutes."""
    vocab: Path | Sequence[str] | None = None
    """A vocab.txt or its tokens, or None to train one of at most `vocab_size` tokens from the
    sentences."""
    vocab_size: int = 30522
    answers: Sequence[str] | None = None
    """The answer table, or None to make one of all answers that at least `min_answer_count`
    sentences have."""
    min_answer_count: int = 1
    shard_bytes: int = 128 << 20
    """A shard is closed when its tar has as many."""
    images_per_shard: int | None = None
    """A shard is closed when it has as many, too."""
    max_tokens: int = 20
    """Longest sentence with [CLS] and [SEP]; the rest is cut off."""
    num_object_classes: int = 1600
    """Range of object labels, where records have them."""
    num_attribute_classes: int = 400
    overwrite: bool = False
    """Replace a data set at the output."""
    skip_bad: bool = False
    """Leave bad records out and report them. Which have the wrong layout (width of features, labels
    or none), most of the first 100 good records decide, without this the first one."""


@dataclass(frozen=True)
class _Job:
    """A build under way: what its parts share."""

    folder: Path
    """Where everything is made."""
    settings: BuildSettings
    report: Report
    progress: Progress


def build(
    records: Iterable[ImageRecord],
    out_url: str | Path,
    settings: BuildSettings,
    *,
    staging: str | Path | None = None,
    report: Report | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Write a data set to `out_url` (a folder or s3:// prefix) and return its manifest.

    staging: folder for a build to object storage, which needs room for the whole data set (default:
    the system's temporary folder); a local build is staged in the output folder itself.
    report: collects what was left out.
    Raises DataError naming image, file or place; the output is then as it was before.
    """
    out = str(out_url)
    _check_settings(settings)
    tokens = settings.vocab
    if isinstance(tokens, Path):
        tokens = load_vocab(tokens)
    if not settings.overwrite:
        check_free(out, MANIFEST, _OWNED)
    with staging_folder(out, staging) as folder:
        job = _Job(folder, settings, report or Report(), progress)
        shards, schema = _write_tars(job, records)
        manifest = _write_rest(job, shards, schema, list(tokens or _train(job, shards)))
        (folder / MANIFEST).write_bytes(manifest.to_json())
        files = [*_files(manifest), MANIFEST]
        publish(folder, out, files, _OWNED, progress, settings.overwrite)
    return manifest


def _check_settings(settings: BuildSettings) -> None:
    if settings.max_tokens < 3:
        raise DataError(f"max_tokens is {settings.max_tokens}: there is no room for a word")
    for name, value in (
        ("shard_bytes", settings.shard_bytes),
        ("images_per_shard", settings.images_per_shard),
    ):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}: give at least 1")
    for given in (settings.name, settings.extractor):
        try:
            given.encode()
        except UnicodeEncodeError:
            raise DataError(f"the name {given!a:.80} is not valid Unicode: give another") from None


def _files(manifest: Manifest) -> list[str]:
    """Names of everything but the manifest."""
    files = [name for shard in manifest.shards for name in (shard.name, shard.table)]
    return [*files, *(f.file for f in (manifest.vocab, manifest.answers, *manifest.pages))]


# --- tars ---------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """A written tar and its images; one entry an image in each list."""

    name: str
    spool: Path
    """Of the records' JSON, a line each."""
    objects: list[int]
    record_size: list[int]
    offset: dict[str, list[int]]
    """By member."""
    size: int = 0
    sha256: str = ""

    def documents(self) -> Iterator[Document]:
        with open(self.spool, "rb") as f:
            for line in f:
                yield json.loads(line)


class _ShardWriter:
    """A tar that is being written, and its spool beside it."""

    def __init__(self, folder: Path, number: int, members: list[Member]) -> None:
        name = f"shard-{number:06d}.tar"
        self.shard = _Shard(name, folder / f"{name}.spool", [], [], {m.name: [] for m in members})
        self._members = members
        self._tar = TarWriter(folder / name)
        self._spool = open(self.shard.spool, "wb")  # noqa: SIM115  closed by `close` or `abort`

    def append(self, record: ImageRecord, text: bytes) -> None:
        """Add a record, whose JSON is `text`."""
        key = record_key(record.image)
        for member in self._members:
            payload = text if member is RECORD else member.payload(record)
            offset = self._tar.add(f"{key}.{member.suffix}", payload)
            self.shard.offset[member.name].append(offset)
        self.shard.objects.append(len(record.boxes))
        self.shard.record_size.append(len(text))
        self._spool.write(text + b"\n")

    def is_full(self, settings: BuildSettings) -> bool:
        images = len(self.shard.objects)
        return self._tar.size >= settings.shard_bytes or images == settings.images_per_shard

    def close(self) -> _Shard:
        self._spool.close()
        self.shard.sha256 = self._tar.finish()
        self.shard.size = self._tar.size
        return self.shard

    def abort(self) -> None:
        self._tar.abort()
        self._spool.close()


def _write_tars(job: _Job, records: Iterable[ImageRecord]) -> tuple[list[_Shard], Schema]:
    """Write all tars and spools; the schema has everything but the vocabulary's size."""
    shards: list[_Shard] = []
    schema: Schema | None = None
    writer: _ShardWriter | None = None
    most, images = 0, 0
    try:
        for schema, record, text in _checked(job, records):
            writer = writer or _ShardWriter(job.folder, len(shards), members_of(schema))
            writer.append(record, text)
            most, images = max(most, len(record.boxes)), images + 1
            job.progress("images written", images, None)
            if writer.is_full(job.settings):
                shards.append(writer.close())
                writer = None
        if writer:
            shards.append(writer.close())
            writer = None
    finally:
        if writer:
            writer.abort()
    if schema is None:
        raise DataError("there is no image record to build from: check the names in the sources")
    job.progress("images written", images, images)
    return shards, replace(schema, max_objects=most)


def _checked(
    job: _Job, records: Iterable[ImageRecord]
) -> Iterator[tuple[Schema, ImageRecord, bytes]]:
    """The good records with their JSON. The schema is the first record's; where bad ones are left
    out, it is the one that most of the first good ones have (of as many, the earliest): a record
    of garbage does not decide for the rest."""
    left, first = iter(records), list[ImageRecord]()
    for record in left:
        try:
            if job.settings.skip_bad:
                check_record(record, _schema_of(record, job.settings))
        except DataError as error:
            job.report.add("bad image records", str(error))
            continue
        first.append(record)
        if len(first) == (_VOTERS if job.settings.skip_bad else 1):
            break
    if not first:
        return
    schema = Counter(_schema_of(r, job.settings) for r in first).most_common(1)[0][0]
    keys: set[str] = set()
    for record in chain(first, left):
        try:
            check_record(record, schema)
            key, text = record_key(record.image), _json(record)
            if key in keys:
                raise DataError(f"image {record.image!r:.120} comes twice: name its sources once")
        except DataError as error:
            if not job.settings.skip_bad:
                raise DataError(f"{error}; or leave such records out with --skip-bad") from None
            job.report.add("bad image records", str(error))
            continue
        keys.add(key)
        yield schema, record, text


def _schema_of(record: ImageRecord, settings: BuildSettings) -> Schema:
    labels = record.labels is not None
    return Schema(
        feature_dim=int(record.features.shape[1]) if record.features.ndim == 2 else 0,
        max_objects=1 << 16,
        labels=labels,
        num_object_classes=settings.num_object_classes if labels else 0,
        num_attribute_classes=settings.num_attribute_classes if labels else 0,
        max_tokens=settings.max_tokens,
        vocab_size=0,
    )


def _json(record: ImageRecord) -> bytes:
    try:
        return record_json(record)
    except UnicodeEncodeError:
        raise DataError(
            f"image {record.image!a:.120} has text that is not valid Unicode: correct its source"
        ) from None


# --- vocabulary, answers, tables ----------------------------------------------------------------


def _train(job: _Job, shards: list[_Shard]) -> list[str]:
    """A vocabulary of all sentences."""
    job.progress("vocabulary trained", 0, 1)
    texts = (s["text"] for shard in shards for d in shard.documents() for s in d["sentences"])
    tokens = train_vocab(texts, job.settings.vocab_size)
    job.progress("vocabulary trained", 1, 1)
    return tokens


def _answers(job: _Job, shards: list[_Shard]) -> list[str]:
    """The answer table: the given one, or one of all answers."""
    if job.settings.answers is not None:
        return list(job.settings.answers)
    sentences = (s for shard in shards for d in shard.documents() for s in d["sentences"])
    found = (s["answers"] for s in sentences if "answers" in s)
    return count_answers(found, job.settings.min_answer_count)


def _write_rest(job: _Job, shards: list[_Shard], schema: Schema, tokens: list[str]) -> Manifest:
    """Write tables, vocabulary and answers; returns the manifest of what is in the folder."""
    folder, settings = job.folder, job.settings
    schema = replace(schema, vocab_size=len(tokens))
    answers = _answers(job, shards)
    sources, with_answers = _sources(shards)
    encoder = SentenceEncoder(schema, sources, make_tokenizer(tokens), answer_index(answers))
    infos = []
    for shard in shards:
        infos.append(_write_table(job, shard, encoder))
        job.progress("tables written", len(infos), len(shards))
    (folder / VOCAB).write_bytes("".join(f"{t}\n" for t in tokens).encode())
    (folder / ANSWERS).write_bytes((json.dumps(answers, indent=0) + "\n").encode())
    totals = {s: sum(i.pairs_per_source.get(s, 0) for i in infos) for s in sources}
    manifest = Manifest(
        name=settings.name,
        extractor=settings.extractor,
        schema=schema,
        sources=tuple(sources),
        question_sources=tuple(s for s in sources if s in with_answers | QA_SOURCES),
        vocab=_file_info(folder, VOCAB, len(tokens)),
        answers=_file_info(folder, ANSWERS, len(answers)),
        counts=Counts(sum(i.images for i in infos), sum(i.pairs for i in infos), totals),
        shards=ShardList.of(infos, sources),
    )
    return with_pages(manifest, folder)


def _sources(shards: list[_Shard]) -> tuple[list[str], set[str]]:
    """The sources of all sentences, sorted, and those of sentences with answers."""
    found: set[str] = set()
    with_answers: set[str] = set()
    for shard in shards:
        for document in shard.documents():
            for s in document["sentences"]:
                found.add(s["source"])
                if s.get("answers"):
                    with_answers.add(s["source"])
    if len(found) > 256:
        raise DataError(f"there are {len(found)} sources of sentences: 256 is the limit")
    return sorted(found), with_answers


def _write_table(job: _Job, shard: _Shard, encoder: SentenceEncoder) -> ShardInfo:
    """Write a shard's table and remove its spool."""

    def unknown(document: Document, text: str, answer: str) -> None:
        # A table that the user gave should have every answer; one made from the data need not.
        if job.settings.answers is not None and not job.settings.skip_bad:
            raise DataError(
                f"image {document['image']}, {text!r:.60}: the answer {answer!r:.40} is not in the "
                "answer table: add it there, or --skip-bad leaves such answers out and counts them"
            )
        job.report.add("answers that are not in the answer table", answer)

    arrays = {
        **member_columns(shard.objects, shard.record_size, shard.offset),
        **encoder.arrays(shard.documents(), unknown),
    }
    path = job.folder / f"{shard.name.removesuffix('.tar')}.table.safetensors"
    save_arrays(path, arrays)
    shard.spool.unlink()
    sources = encoder.sources
    pairs = np.bincount(arrays["sentence_source"], minlength=len(sources)).tolist()
    return ShardInfo(
        name=shard.name,
        size=shard.size,
        sha256=shard.sha256,
        table=path.name,
        table_size=path.stat().st_size,
        table_sha256=hash_file(path),
        images=len(arrays["image_objects"]),
        pairs=len(arrays["sentence_source"]),
        pairs_per_source={s: n for s, n in zip(sources, pairs, strict=True) if n},
    )


def _file_info(folder: Path, name: str, count: int) -> FileInfo:
    path = folder / name
    return FileInfo(name, hash_file(path), os.stat(path).st_size, count)
