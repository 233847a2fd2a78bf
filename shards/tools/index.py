"""A manifest for tars that others wrote: they are trained on where they are, and stay as they are.

Tables, vocabulary, answer table and manifest are written beside them, under names of their own
(`index-<random>-…`), so that nothing of the owner's is replaced, and `lxscale shards clean` never
takes a tar for a build's. What a tar needs is in shards/format/foreign.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.answers import answer_index, count_answers, load_answers
from shards.format.arrays import save_arrays
from shards.format.build import write_words
from shards.format.foreign import guess, scan
from shards.format.manifest import Counts, FileInfo, Manifest, Schema, given_file, with_pages
from shards.format.publish import Delivery, commit_point, delivery
from shards.format.record import QA_SOURCES, Report, record_key
from shards.format.sentences import Document, SentenceEncoder, Unknown
from shards.format.shard_list import ShardInfo, ShardList, check_name
from shards.format.shard_writer import table_name
from shards.format.staging import staging_folder
from shards.format.tokenizer import load_vocab, make_tokenizer, train_vocab
from shards.progress import Progress, no_progress
from shards.sources import tars
from shards.store import objects
from shards.store.marks import identity_of
from shards.store.stored import hash_file
from shards.tools.rewriting import bring


@dataclass(frozen=True)
class Indexing:
    """What an index is asked for."""

    name: str
    extractor: str = "unknown"
    """What made the features."""
    vocab: Path | None = None
    """A vocab.txt, or a data set that has one; None to train one of at most `vocab_size` tokens."""
    vocab_size: int = 30522
    answers: Path | None = None
    """A JSON of the answer table, or a data set that has one; None to make one of all answers that
    at least `min_answer_count` sentences have."""
    min_answer_count: int = 1
    max_tokens: int = 20
    """Longest sentence with [CLS] and [SEP]; the rest is cut off."""
    num_object_classes: int = 1600
    """Range of object labels, where samples have `labels.bin`."""
    num_attribute_classes: int = 400


@dataclass(frozen=True)
class _Tar:
    """A tar that has been scanned."""

    name: str
    size: int
    sha256: str
    columns: Mapping[str, NDArray]
    """Of its table, but for the sentences: some 50 bytes an image in memory."""
    spool: Path
    """The JSON of its records, a line each."""

    def documents(self) -> Iterator[Document]:
        with open(self.spool, "rb") as f:
            for line in f:
                yield json.loads(line)


def index(
    url: str,
    how: Indexing,
    *,
    overwrite: bool = False,
    staging: Path | None = None,
    report: Report | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Write a manifest of all tars at `url` (a folder or s3:// prefix) beside them.

    staging: room for a tar, where they are remote. report: collects samples without sentences,
    which the data set lacks, and answers that are not in a table that was given.
    Raises DataError naming tar, sample and member where one cannot be used in place; the place is
    then as it was before.
    """
    before, report = commit_point(url, overwrite), report or Report()
    names = [n for n in objects.list_names(url) if n.endswith(".tar") and not n.startswith(".")]
    if not names:
        raise DataError(f"there is no .tar at {url}: give the folder that has them")
    for name in names:
        try:
            check_name(name)
        except ValueError as error:
            raise DataError(f"{url}: {error}: give it another name") from None
    with staging_folder(url, staging) as folder, delivery(url, before, beside=True) as build:
        schema = _first_schema(objects.join(url, names[0]), how, folder)
        found, seen = list[_Tar](), dict[str, str]()
        for number, name in enumerate(names):
            if tar := _scan(objects.join(url, name), schema, folder, seen, report):
                found.append(tar)
            progress("tars read", number + 1, len(names))
        if not found:
            raise DataError(f"no sample at {url} has sentences")
        return build.commit(_write(build, folder, found, schema, how, report, progress))


def _first_schema(url: str, how: Indexing, folder: Path) -> Schema:
    """The schema, but for the vocabulary's size and the most objects."""
    rough = Schema(
        feature_dim=1,
        max_objects=1 << 16,
        labels=False,
        num_object_classes=how.num_object_classes,
        num_attribute_classes=how.num_attribute_classes,
        max_tokens=how.max_tokens,
        vocab_size=0,
    )
    with tars.opened(url, folder) as f:
        return guess(f, rough, url)


def _scan(
    url: str, schema: Schema, folder: Path, seen: dict[str, str], report: Report
) -> _Tar | None:
    """What a tar has; None where no sample has sentences. seen: key of each image so far, and its
    tar, some 150 bytes an image in memory."""
    path, name = objects.local_path(url), url.rpartition("/")[2]
    before = identity_of(path.stat()) if path else None
    with tars.opened(url, folder) as f:
        scanned = scan(f, schema, url)
        f.seek(0)
        digest = hashlib.file_digest(f, "sha256").hexdigest()  # type: ignore[arg-type]
        size = f.seek(0, os.SEEK_END)
    if path and identity_of(path.stat()) != before:
        raise DataError(f"{url} changed while it was read: let no one write to it")
    for key in scanned.left_out:
        report.add("samples without sentences", f"{url}, {key}")
    spool = folder / f"{name}.spool"
    with open(spool, "w") as out:
        for document in scanned.documents:
            key = record_key(document["image"])
            if other := seen.get(key):
                raise DataError(
                    f"image {document['image']!r:.120} of {url} is in {other}, too: each may come "
                    "once"
                )
            seen[key] = url
            out.write(json.dumps(document) + "\n")
    if not scanned.documents:
        return None
    return _Tar(name, size, digest, scanned.columns(), spool)


def _write(
    build: Delivery,
    folder: Path,
    found: list[_Tar],
    schema: Schema,
    how: Indexing,
    report: Report,
    progress: Progress,
) -> Manifest:
    """Write all but the manifest, which it returns."""
    pairs, answered = Counter[str](), set[str]()
    for s in _sentences(found):
        pairs[s["source"]] += 1
        if s.get("answers"):
            answered.add(s["source"])
    sources = sorted(pairs)
    if len(sources) > 256:
        raise DataError(f"there are {len(sources)} sources of sentences: 256 is the limit")
    tokens, answers = _words(found, how, progress)
    most = max(int(tar.columns["image_objects"].max()) for tar in found)
    schema = replace(schema, vocab_size=len(tokens), max_objects=most)
    encoder = SentenceEncoder(schema, sources, make_tokenizer(tokens), answer_index(answers))

    def unknown(_document: Document, _text: str, answer: str) -> None:
        report.add("answers that are not in the answer table", answer)

    infos: list[ShardInfo] = []
    for tar in found:
        infos.append(_write_table(build, folder, tar, encoder, unknown))
        progress("tables written", len(infos), len(found))
    vocab, words = (_renamed(build, folder, file) for file in write_words(folder, tokens, answers))
    questions = answered | QA_SOURCES
    manifest = with_pages(
        Manifest(
            name=how.name,
            extractor=how.extractor,
            schema=schema,
            sources=tuple(sources),
            question_sources=tuple(s for s in sources if s in questions),
            vocab=vocab,
            answers=words,
            counts=Counts(
                sum(i.images for i in infos), pairs.total(), {s: pairs[s] for s in sources}
            ),
            shards=ShardList.of(infos, sources),
        ),
        folder,
        f"{build.mark}shards-",
    )
    for file in (vocab, words, *manifest.pages):
        bring(build, folder / file.file)
    return manifest


def _sentences(found: list[_Tar]) -> Iterator[Any]:
    return (s for tar in found for d in tar.documents() for s in d["sentences"])


def _words(
    found: list[_Tar], how: Indexing, progress: Progress
) -> tuple[Sequence[str], Sequence[str]]:
    """Vocabulary and answer table, given or of the sentences."""
    if how.vocab:
        tokens = load_vocab(given_file(how.vocab, "vocab"))
    else:
        progress("vocabulary trained", 0, 1)
        tokens = train_vocab((s["text"] for s in _sentences(found)), how.vocab_size)
        progress("vocabulary trained", 1, 1)
    if how.answers:
        return tokens, load_answers(given_file(how.answers, "answers"))
    answers = (s["answers"] for s in _sentences(found) if "answers" in s)
    return tokens, count_answers(answers, how.min_answer_count)


def _write_table(
    build: Delivery, folder: Path, tar: _Tar, encoder: SentenceEncoder, unknown: Unknown
) -> ShardInfo:
    path = folder / f"{build.mark}{table_name(tar.name)}"
    arrays = {**tar.columns, **encoder.arrays(tar.documents(), unknown)}
    save_arrays(path, arrays)
    pairs = np.bincount(arrays["sentence_source"], minlength=len(encoder.sources)).tolist()
    info = ShardInfo(
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
    bring(build, path)
    return info


def _renamed(build: Delivery, folder: Path, file: FileInfo) -> FileInfo:
    """A staged file under a name of its own."""
    name = f"{build.mark}{file.file}"
    (folder / file.file).rename(folder / name)
    return replace(file, file=name)
