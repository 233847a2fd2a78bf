"""Building a data set: image records → shards, tables, vocabulary, answers, manifest.

One pass over the records writes the tars and spools the sentences; vocabulary and answer table are
then given or made from the spool, and the tables follow. Everything is made in a staging folder
and published at the end, manifest last: an interrupted build leaves no file under its final name.
The same records and settings give the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.format.answers import answer_index, count_answers, normalise_answers
from shards.format.manifest import MANIFEST, Counts, FileInfo, Manifest, Schema, ShardInfo
from shards.format.record import (
    QA_SOURCES,
    ImageRecord,
    Report,
    check_record,
    labels_bytes,
    record_json,
    record_key,
)
from shards.format.staging import publish, staging_folder
from shards.format.table import save_arrays
from shards.format.tar import TarWriter
from shards.format.tokenizer import encode_batch, load_vocab, make_tokenizer, train_vocab
from shards.store import objects
from shards.store.cache import hash_file

log = logging.getLogger("lxscale")

VOCAB, ANSWERS = "vocab.txt", "answers.json"
SHARD_FILE = re.compile(r"shard-\d{6}\.(tar|table\.safetensors)")


@dataclass(frozen=True)
class BuildSettings:
    """What a build is asked for.

    name, extractor: recorded in the manifest; features of two extractors are no substitutes
    vocab: a vocab.txt or its tokens, or None to train one of at most `vocab_size` tokens from the
        sentences
    answers: the answer table, or None to make one of all answers that at least `min_answer_count`
        sentences have
    shard_bytes: a shard is closed when its tar has as many; images_per_shard: when it has as many
    max_tokens: longest sentence with [CLS] and [SEP], the rest is cut off
    num_object_classes, num_attribute_classes: ranges of labels, where records have them
    overwrite: replace a data set at the output; skip_bad: leave bad records out and report them
    """

    name: str
    extractor: str
    vocab: Path | Sequence[str] | None = None
    vocab_size: int = 30522
    answers: Sequence[str] | None = None
    min_answer_count: int = 1
    shard_bytes: int = 128 << 20
    images_per_shard: int | None = None
    max_tokens: int = 20
    num_object_classes: int = 1600
    num_attribute_classes: int = 400
    overwrite: bool = False
    skip_bad: bool = False


@dataclass
class _Shard:
    """A written tar and where in it things are; one entry an image in each list."""

    name: str
    spool: Path
    size: int = 0
    sha256: str = ""
    offsets: dict[str, list[int]] = field(default_factory=dict)


def build(
    records: Iterable[ImageRecord],
    out_url: str | Path,
    settings: BuildSettings,
    *,
    staging: str | Path | None = None,
    report: Report | None = None,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Write a data set to `out_url` (a folder or s3:// prefix) and return its manifest.

    staging: folder for a build to object storage, which needs room for the whole data set (default:
    the system's temporary folder); a local build is staged in the output folder itself.
    report: collects what was left out. progress: called with a line of text from time to time.
    Raises DataError naming image, file or place; the output is then as it was before.
    """
    out = str(out_url)
    report = report if report is not None else Report()
    say = progress or (lambda text: None)
    if settings.max_tokens < 3:
        raise DataError(f"max_tokens is {settings.max_tokens}: there is no room for a word")
    if min(settings.shard_bytes, settings.images_per_shard or 1) < 1:
        raise DataError("shard_bytes and images_per_shard have to be at least 1")
    tokens = settings.vocab
    if isinstance(tokens, Path):
        tokens = load_vocab(tokens)
    manifest_url = objects.join(out, MANIFEST)
    if not settings.overwrite and objects.exists(manifest_url):
        raise DataError(
            f"there is a data set at {out}: choose another place, or replace it with --overwrite"
        )
    try:
        with staging_folder(out, staging) as folder:
            shards, schema = _write_tars(records, folder, settings, report, say)
            if tokens is None:
                say("training the vocabulary")
                tokens = train_vocab(_texts(shards), settings.vocab_size)
            answers = settings.answers
            if answers is None:
                answers = count_answers(_all_answers(shards), settings.min_answer_count)
            manifest = _finish(
                folder, shards, schema, list(tokens), list(answers), settings, report, say
            )
            (folder / MANIFEST).write_bytes(manifest.to_json())
            if not settings.overwrite and objects.exists(manifest_url):
                raise DataError(f"another build has finished at {out} meanwhile: this one stops")
            say(f"publishing to {out}")
            names = [*_files(manifest), MANIFEST]
            publish(folder, out, names, SHARD_FILE)
    except OSError as error:
        place = error.filename or out
        raise DataError(f"cannot write {place}: {error.strerror or error}") from error
    return manifest


def _files(manifest: Manifest) -> list[str]:
    """Names of everything but the manifest."""
    files = [name for shard in manifest.shards for name in (shard.name, shard.table)]
    return [*files, manifest.vocab.file, manifest.answers.file]


# --- tars ---------------------------------------------------------------------------------------


def _write_tars(
    records: Iterable[ImageRecord],
    folder: Path,
    settings: BuildSettings,
    report: Report,
    say: Callable[[str], None],
) -> tuple[list[_Shard], Schema]:
    """Write all tars and spools; the schema has everything but the vocabulary's size."""
    shards: list[_Shard] = []
    writer: TarWriter | None = None
    schema: Schema | None = None
    keys: set[str] = set()
    most, images = 0, 0
    limit = settings.images_per_shard
    try:
        for record in records:
            if schema is None:
                schema = _schema_of(record, settings)
            try:
                check_record(record, schema)
                key, text = record_key(record.image), _json(record)
                if key in keys:
                    raise DataError(f"image {record.image!r:.120} comes twice")
            except DataError as error:
                if not settings.skip_bad:
                    raise
                report.add("bad image records", str(error))
                continue
            keys.add(key)
            if writer is None:
                name = f"shard-{len(shards):06d}.tar"
                shards.append(_Shard(name, folder / f"{name}.spool"))
                writer = TarWriter(folder / name)
                spool = open(shards[-1].spool, "wb")  # noqa: SIM115  closed with its shard
            _append(writer, shards[-1], record, key, text)
            spool.write(text + b"\n")
            most, images = max(most, len(record.boxes)), images + 1
            if writer.size >= settings.shard_bytes or len(shards[-1].offsets["objects"]) == limit:
                _close(writer, shards[-1], spool)
                writer = None
                say(f"{shards[-1].name} is written, {images} images so far")
        if writer is not None:
            _close(writer, shards[-1], spool)
            writer = None
    finally:
        if writer is not None:
            writer.abort()
            spool.close()
    if schema is None or not shards:
        raise DataError("there is no image record to build from: check the names in the sources")
    return shards, Schema(**{**vars(schema), "max_objects": most})


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


def _append(writer: TarWriter, shard: _Shard, record: ImageRecord, key: str, text: bytes) -> None:
    at = {
        "objects": len(record.boxes),
        "record_size": len(text),
        "record": writer.add(f"{key}.json", text),
        "boxes": writer.add(f"{key}.boxes.f32", record.boxes.astype("<f4").tobytes()),
    }
    if record.labels is not None:
        at["labels"] = writer.add(f"{key}.labels.bin", labels_bytes(record.labels))
    at["features"] = writer.add(f"{key}.features.f16", record.features.astype("<f2").tobytes())
    for name, value in at.items():
        shard.offsets.setdefault(name, []).append(value)


def _close(writer: TarWriter, shard: _Shard, spool: Any) -> None:
    spool.close()
    shard.sha256 = writer.finish()
    shard.size = writer.size


# --- vocabulary, answers, tables ----------------------------------------------------------------


def _documents(shard: _Shard) -> Iterator[dict[str, Any]]:
    with open(shard.spool, "rb") as f:
        for line in f:
            yield json.loads(line)


def _texts(shards: list[_Shard]) -> Iterator[str]:
    return (s["text"] for shard in shards for d in _documents(shard) for s in d["sentences"])


def _all_answers(shards: list[_Shard]) -> Iterator[dict[str, float]]:
    return (
        s["answers"]
        for shard in shards
        for d in _documents(shard)
        for s in d["sentences"]
        if "answers" in s
    )


def table_arrays(
    documents: Iterable[dict[str, Any]],
    offsets: dict[str, list[int]],
    sources: Sequence[str],
    tokenizer: Any,
    answers: dict[str, int],
    schema: Schema,
    report: Report,
    must_know: bool,
) -> dict[str, Any]:
    """The arrays of a shard's table (see `shards.format.table.Table`) from its records' JSON.

    must_know: an answer that is not in the table is a DataError; else it is left out and reported.
    """
    numbers = {source: i for i, source in enumerate(sources)}
    texts: list[str] = []
    source_of: list[int] = []
    counts: list[int] = []
    answer_counts: list[int] = []
    ids: list[int] = []
    scores: list[float] = []
    for document in documents:
        counts.append(len(document["sentences"]))
        for sentence in document["sentences"]:
            texts.append(sentence["text"])
            source_of.append(numbers[sentence["source"]])
            before = len(ids)
            for answer, score in normalise_answers(sentence.get("answers") or {}).items():
                if answer in answers:
                    ids.append(answers[answer])
                    scores.append(score)
                elif must_know:
                    raise DataError(
                        f"image {document['image']}, {sentence['text']!r:.60}: the answer "
                        f"{answer!r:.40} is not in the answer table: add it there, or --skip-bad "
                        "leaves such answers out and counts them"
                    )
                else:
                    report.add("answers that are not in the answer table", answer)
            answer_counts.append(len(ids) - before)
    tokens = encode_batch(tokenizer, texts, schema.max_tokens - 2)
    arrays = {
        "image_objects": np.asarray(offsets["objects"], dtype=np.int32),
        "features_offset": np.asarray(offsets["features"], dtype=np.int64),
        "boxes_offset": np.asarray(offsets["boxes"], dtype=np.int64),
        "record_offset": np.asarray(offsets["record"], dtype=np.int64),
        "record_size": np.asarray(offsets["record_size"], dtype=np.int64),
        "image_sentences": _starts(counts),
        "sentence_source": np.asarray(source_of, dtype=np.uint8),
        "token_start": _starts([len(t) for t in tokens]),
        "tokens": np.fromiter(
            (i for t in tokens for i in t),
            dtype=np.uint16 if schema.vocab_size <= 65535 else np.uint32,
        ),
        "answer_start": _starts(answer_counts),
        "answer_id": np.asarray(ids, dtype=np.int32),
        "answer_score": np.asarray(scores, dtype=np.float32),
    }
    if schema.labels:
        arrays["labels_offset"] = np.asarray(offsets["labels"], dtype=np.int64)
    return arrays


def _starts(counts: list[int]) -> Any:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _finish(
    folder: Path,
    shards: list[_Shard],
    schema: Schema,
    tokens: list[str],
    answers: list[str],
    settings: BuildSettings,
    report: Report,
    say: Callable[[str], None],
) -> Manifest:
    """Write tables, vocabulary and answers; returns the manifest of what is in `folder`."""
    schema = Schema(**{**vars(schema), "vocab_size": len(tokens)})
    found: set[str] = set()
    with_answers: set[str] = set()
    for shard in shards:
        for document in _documents(shard):
            for s in document["sentences"]:
                found.add(s["source"])
                if s.get("answers"):
                    with_answers.add(s["source"])
    sources = sorted(found)
    if len(sources) > 256:
        raise DataError(f"there are {len(sources)} sources of sentences: 256 is the limit")
    tokenizer, index = make_tokenizer(tokens), answer_index(answers)
    infos = []
    for shard in shards:
        table = shard.name.removesuffix(".tar") + ".table.safetensors"
        # A table that the user gave should have every answer; one made from the data need not.
        must_know = settings.answers is not None and not settings.skip_bad
        arrays = table_arrays(
            _documents(shard), shard.offsets, sources, tokenizer, index, schema, report, must_know
        )
        save_arrays(folder / table, arrays)
        shard.spool.unlink()
        per_source = np.bincount(arrays["sentence_source"], minlength=len(sources)).tolist()
        infos.append(
            ShardInfo(
                name=shard.name,
                size=shard.size,
                sha256=shard.sha256,
                table=table,
                table_size=(folder / table).stat().st_size,
                table_sha256=hash_file(folder / table),
                images=len(arrays["image_objects"]),
                pairs=len(arrays["sentence_source"]),
                pairs_per_source={s: n for s, n in zip(sources, per_source, strict=True) if n},
            )
        )
        say(f"{table} is written")
    (folder / VOCAB).write_bytes("".join(f"{t}\n" for t in tokens).encode())
    (folder / ANSWERS).write_bytes((json.dumps(answers, indent=0) + "\n").encode())
    totals = {s: sum(i.pairs_per_source.get(s, 0) for i in infos) for s in sources}
    return Manifest(
        name=settings.name,
        extractor=settings.extractor,
        schema=schema,
        sources=tuple(sources),
        question_sources=tuple(s for s in sources if s in with_answers | QA_SOURCES),
        vocab=_file_info(folder, VOCAB, len(tokens)),
        answers=_file_info(folder, ANSWERS, len(answers)),
        counts=Counts(sum(i.images for i in infos), sum(i.pairs for i in infos), totals),
        shards=tuple(infos),
    )


def _file_info(folder: Path, name: str, count: int) -> FileInfo:
    path = folder / name
    return FileInfo(name, hash_file(path), os.stat(path).st_size, count)
