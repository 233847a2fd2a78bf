"""Building a data set: image records → shards, tables, vocabulary, answers, manifest.

One pass over the records writes the tars and spools the sentences; vocabulary and answer table are
then given or made from the spool, and the tables follow. Everything is made in a staging folder
and published at the end, manifest last: an interrupted build leaves no file under its final name.
The same records and settings give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from shards.errors import DataError
from shards.format.answers import answer_index, count_answers
from shards.format.check import check_record
from shards.format.features import FeatureType, Rounding
from shards.format.manifest import (
    Counts,
    FileInfo,
    Manifest,
    Schema,
    given_file,
    with_pages,
)
from shards.format.members import Member, members_of
from shards.format.publish import commit_point, publish
from shards.format.record import QA_SOURCES, ImageRecord, Report, record_json, record_key
from shards.format.sentences import Document, SentenceEncoder
from shards.format.shard_list import ShardInfo, ShardList
from shards.format.shard_writer import ShardWriter, WrittenTar, write_table
from shards.format.staging import staging_folder
from shards.format.tokenizer import load_vocab, make_tokenizer, train_vocab
from shards.progress import Progress, no_progress
from shards.store.stored import hash_file

VOCAB, ANSWERS = "vocab.txt", "answers.json"
# Records whose layouts are compared before the first is written, where bad ones are left out; they
# are in memory at one time.
_VOTERS = 100


@dataclass(frozen=True)
class BuildSettings:
    """What a build is asked for."""

    name: str
    """Recorded in the manifest."""
    extractor: str
    """What made the features, recorded, too: those of two extractors are no substitutes."""
    vocab: Path | Sequence[str] | None = None
    """A vocab.txt, or the folder of a data set that has one; or its tokens; or None to train one
    of at most `vocab_size` tokens from the sentences."""
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
    feature_type: FeatureType = "fp16"
    """How features are stored (features.py)."""
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
    check_settings(settings)
    tokens = settings.vocab
    if isinstance(tokens, Path):
        tokens = load_vocab(given_file(tokens, "vocab"))
    before = commit_point(out, settings.overwrite)
    with staging_folder(out, staging) as folder:
        job = _Job(folder, settings, report or Report(), progress)
        shards, schema = _write_tars(job, records)
        manifest = _write_rest(job, shards, schema, list(tokens or _train(job, shards)))
        return publish(folder, out, manifest, _files(manifest), before, progress)


def check_settings(settings: BuildSettings) -> None:
    """DataError for settings that no data set can have."""
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
    """A written tar and the spool of its records' JSON, a line each."""

    tar: WrittenTar
    spool: Path

    def documents(self) -> Iterator[Document]:
        with open(self.spool, "rb") as f:
            for line in f:
                yield json.loads(line)


class _Spooled:
    """A tar that is being written, and its spool beside it."""

    def __init__(self, folder: Path, number: int, members: list[Member]) -> None:
        name = f"shard-{number:06d}.tar"
        self._path = folder / f"{name}.spool"
        self._writer = ShardWriter(folder, name, members)
        self._spool = open(self._path, "wb")  # noqa: SIM115  closed by `close` or `abort`

    def append(self, record: ImageRecord, text: bytes) -> None:
        self._writer.append(record, text)
        self._spool.write(text + b"\n")

    def is_full(self, settings: BuildSettings) -> bool:
        full = self._writer.size >= settings.shard_bytes
        return full or self._writer.images == settings.images_per_shard

    def close(self) -> _Shard:
        self._spool.close()
        return _Shard(self._writer.close(), self._path)

    def abort(self) -> None:
        self._writer.abort()
        self._spool.close()


def _write_tars(job: _Job, records: Iterable[ImageRecord]) -> tuple[list[_Shard], Schema]:
    """Write all tars and spools; the schema has everything but the vocabulary's size."""
    shards: list[_Shard] = []
    schema: Schema | None = None
    writer: _Spooled | None = None
    most, images, errors = 0, 0, Rounding()
    try:
        for schema, record, text in _checked(job, records):
            if schema.feature_type == "uint8":
                record = replace(record, features=errors.stored(record.features))
            writer = writer or _Spooled(job.folder, len(shards), members_of(schema))
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
    if errors.values:
        job.report.notes.append(errors.line())
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
                check_record(record, schema_of(record, job.settings))
        except DataError as error:
            job.report.add("bad image records", str(error))
            continue
        first.append(record)
        if len(first) == (_VOTERS if job.settings.skip_bad else 1):
            break
    if not first:
        return
    schema = vote(first, job.settings)
    keys: set[str] = set()
    for record in chain(first, left):
        try:
            check_record(record, schema)
            key, text = record_key(record.image), checked_json(record)
            if key in keys:
                raise DataError(f"image {record.image!r:.120} comes twice: name its sources once")
        except DataError as error:
            if not job.settings.skip_bad:
                raise DataError(f"{error}; or leave such records out with --skip-bad") from None
            job.report.add("bad image records", str(error))
            continue
        keys.add(key)
        yield schema, record, text


def vote(records: Sequence[ImageRecord], settings: BuildSettings) -> Schema:
    """The schema, but for the vocabulary's size, that most of these records have; of as many, that
    of the earliest."""
    return Counter(schema_of(r, settings) for r in records).most_common(1)[0][0]


def schema_of(record: ImageRecord, settings: BuildSettings) -> Schema:
    """The schema, but for the vocabulary's size, of a data set of records like this one."""
    labels = record.labels is not None
    return Schema(
        feature_dim=int(record.features.shape[1]) if record.features.ndim == 2 else 0,
        max_objects=1 << 16,
        labels=labels,
        num_object_classes=settings.num_object_classes if labels else 0,
        num_attribute_classes=settings.num_attribute_classes if labels else 0,
        max_tokens=settings.max_tokens,
        vocab_size=0,
        feature_type=settings.feature_type,
        sides=record.sides is not None,
    )


def checked_json(record: ImageRecord) -> bytes:
    """The JSON of a record; DataError where it is not valid Unicode."""
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
    vocab_file, answers_file = write_words(folder, tokens, answers)
    totals = {s: sum(i.pairs_per_source.get(s, 0) for i in infos) for s in sources}
    manifest = Manifest(
        name=settings.name,
        extractor=settings.extractor,
        schema=schema,
        sources=tuple(sources),
        question_sources=tuple(s for s in sources if s in with_answers | QA_SOURCES),
        vocab=vocab_file,
        answers=answers_file,
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

    info = write_table(job.folder, shard.tar, shard.documents(), encoder, unknown)
    shard.spool.unlink()
    return info


def write_words(
    folder: Path, tokens: Sequence[str], answers: Sequence[str]
) -> tuple[FileInfo, FileInfo]:
    """Write a vocabulary and an answer table; how a manifest names them."""
    (folder / VOCAB).write_bytes("".join(f"{t}\n" for t in tokens).encode())
    (folder / ANSWERS).write_bytes((json.dumps(list(answers), indent=0) + "\n").encode())
    return _file_info(folder, VOCAB, len(tokens)), _file_info(folder, ANSWERS, len(answers))


def _file_info(folder: Path, name: str, count: int) -> FileInfo:
    path = folder / name
    return FileInfo(name, hash_file(path), os.stat(path).st_size, count)
