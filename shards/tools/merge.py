"""Several data sets as one: tars byte for byte, under new names, and tables that fit together.

The result is what a build of all records would hold, in the order of the inputs, with the joined
answer table: the first one's answers keep their ids, and those of the others follow. Where
vocabulary, answers and sets of an input are those of the result, its tables are copied, too; else
they are made anew from its records' JSON.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from shards.errors import DataError
from shards.format.answers import answer_index, normalise_answer
from shards.format.arrays import save_arrays
from shards.format.build import write_words
from shards.format.manifest import Counts, Manifest, Schema, given_file, with_pages
from shards.format.publish import commit_point, delivery
from shards.format.sentences import Document, SentenceEncoder
from shards.format.shard_list import ShardInfo, ShardList
from shards.format.shard_writer import table_name
from shards.format.staging import staging_folder
from shards.format.table import member_columns
from shards.format.tokenizer import load_vocab, make_tokenizer
from shards.format.verify_shard import HASH
from shards.progress import Progress, no_progress
from shards.store.stored import hash_file
from shards.tools.copying import copy, scratch
from shards.tools.reading import Input, Shard, mapped, open_input, read_shard
from shards.tools.rewriting import bring

# Of a schema, what inputs may differ in: the result has the most of each.
_MOST = ("max_objects", "max_tokens")


@dataclass(frozen=True)
class Joined:
    """What the inputs make together."""

    schema: Schema
    extractor: str
    tokens: list[str]
    answers: list[str]
    sources: tuple[str, ...]
    question_sources: tuple[str, ...]
    counts: Counts
    shards: int
    bytes: int
    """Of all tars and tables."""
    copied: tuple[bool, ...]
    """Of each input, whether its tables are as they will be."""
    new_answers: int
    """Answers that the first one's table lacks."""


def merge(
    urls: Sequence[str],
    out: str,
    name: str,
    *,
    vocab: Path | None = None,
    allow_extractors: bool = False,
    overwrite: bool = False,
    staging: Path | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Write the data sets at `urls` to `out` as one.

    vocab: a vocab.txt, or a data set that has it, in place of the first one's. staging: room for a
    shard under way, where `out` is no folder. A hash of each image id is in memory, some 100 bytes
    an image.
    Raises DataError naming what does not fit together, an image that comes twice, and what is
    missing or damaged; the output is then as it was before.
    """
    before = commit_point(out, overwrite)
    with staging_folder(out, staging) as folder, delivery(out, before) as build:
        inputs = [open_input(url, folder) for url in urls]
        joined = join(inputs, vocab, allow_extractors)
        encoder = SentenceEncoder(
            joined.schema,
            joined.sources,
            make_tokenizer(joined.tokens),
            answer_index(joined.answers),
        )
        infos: list[ShardInfo] = []
        seen: list[set[bytes]] = [set() for _ in inputs]
        for of, data in enumerate(inputs):
            for number, old in enumerate(data.manifest.shards):
                tar = folder / f"shard-{len(infos):06d}.tar"
                copy(old.tar_at(data.place), tar)
                shard = read_shard(data, number, folder, mapped(tar))
                documents = [shard.document(i) for i in range(len(shard))]
                _check_twice(shard, documents, of, inputs, seen)
                table = folder / table_name(tar.name)
                if joined.copied[of]:
                    copy(old.table_at(data.place), table)
                else:
                    _write_table(table, shard, documents, encoder)
                infos.append(_renamed(old, tar, table))
                bring(build, tar)
                bring(build, table)
                progress("shards merged", len(infos), joined.shards)
        words = write_words(folder, joined.tokens, joined.answers)
        manifest = with_pages(
            Manifest(
                name=name,
                extractor=joined.extractor,
                schema=joined.schema,
                sources=joined.sources,
                question_sources=joined.question_sources,
                vocab=words[0],
                answers=words[1],
                counts=joined.counts,
                shards=ShardList.of(infos, joined.sources),
            ),
            folder,
        )
        for file in (*words, *manifest.pages):
            bring(build, folder / file.file)
        return build.commit(manifest)


def _renamed(old: ShardInfo, tar: Path, table: Path) -> ShardInfo:
    """What a manifest says of a shard whose tar is as it was, and whose table may be another."""
    size, digest = table.stat().st_size, hash_file(table)
    return replace(old, name=tar.name, table=table.name, table_size=size, table_sha256=digest)


def merge_plan(
    urls: Sequence[str],
    *,
    vocab: Path | None = None,
    allow_extractors: bool = False,
    staging: Path | None = None,
) -> Joined:
    """What `merge` would make; manifests, vocabularies and answer tables alone are read, so that an
    image that comes twice is not found. DataError where the data sets do not fit together."""
    with scratch(staging) as folder:
        inputs = [open_input(url, folder) for url in urls]
        return join(inputs, vocab, allow_extractors)


def join(inputs: Sequence[Input], vocab: Path | None, allow_extractors: bool) -> Joined:
    """What inputs make together; DataError naming the difference where they do not fit."""
    if len(inputs) < 2:
        raise DataError("one data set alone is merged with none: name two or more")
    manifests = [data.manifest for data in inputs]
    _check_schemas(inputs)
    _check_same_shards(inputs)
    extractors = list(dict.fromkeys(m.extractor for m in manifests))
    if len(extractors) > 1 and not allow_extractors:
        raise DataError(
            f"the features of {inputs[0].url} are by {extractors[0]!r:.80}, others by "
            f"{extractors[1]!r:.80}: features of different extractors are not interchangeable; "
            "--allow-extractors merges them nevertheless"
        )
    tokens = load_vocab(given_file(vocab, "vocab")) if vocab else inputs[0].tokens
    most = {name: max(getattr(m.schema, name) for m in manifests) for name in _MOST}
    schema = replace(manifests[0].schema, vocab_size=len(tokens), **most)
    answers = _joined_answers(inputs)
    totals = {
        s: sum(m.counts.sentences.get(s, 0) for m in manifests)
        for s in sorted({s for m in manifests for s in m.sources})
    }
    totals = {s: n for s, n in totals.items() if n}
    if len(totals) > 256:
        raise DataError(f"there are {len(totals)} sources of sentences: 256 is the limit")
    questions = {s for m in manifests for s in m.question_sources}
    return Joined(
        schema=schema,
        extractor=" + ".join(extractors),
        tokens=tokens,
        answers=answers,
        sources=tuple(totals),
        question_sources=tuple(s for s in totals if s in questions),
        counts=Counts(sum(m.images for m in manifests), sum(m.pairs for m in manifests), totals),
        shards=sum(len(m.shards) for m in manifests),
        bytes=sum(int(m.shards.size.sum() + m.shards.table_size.sum()) for m in manifests),
        copied=tuple(
            data.tokens == tokens
            and data.answers == answers
            and data.manifest.sources == tuple(totals)
            and data.manifest.schema.max_tokens == schema.max_tokens
            for data in inputs
        ),
        new_answers=len(answers) - len(inputs[0].answers),
    )


def _check_schemas(inputs: Sequence[Input]) -> None:
    first = asdict(inputs[0].manifest.schema)
    for data in inputs[1:]:
        for name, value in asdict(data.manifest.schema).items():
            if name not in (*_MOST, "vocab_size") and value != first[name]:
                raise DataError(
                    f"{data.url} cannot be merged with {inputs[0].url}: its {name} is {value}, not "
                    f"{first[name]}; build both alike"
                )


def _check_same_shards(inputs: Sequence[Input]) -> None:
    """DataError where a shard is in two inputs, or twice in one."""
    where: dict[bytes, str] = {}
    for data in inputs:
        shards = data.manifest.shards
        for name, sha256 in zip(shards.name.tolist(), shards.sha256, strict=True):
            this = f"{data.url}, {name.decode()}"
            if other := where.get(sha256.tobytes()):
                raise DataError(
                    f"{this} is the same shard as {other}: its images would come twice; name each "
                    "data set once"
                )
            where[sha256.tobytes()] = this


def _joined_answers(inputs: Sequence[Input]) -> list[str]:
    """The first one's answers, then those of the others whose normal form is not there yet."""
    out = list(inputs[0].answers)
    known = set(answer_index(out))
    for data in inputs[1:]:
        for answer in data.answers:
            normal = normalise_answer(answer)
            if normal and normal not in known:
                known.add(normal)
                out.append(answer)
    return out


def _check_twice(
    shard: Shard,
    documents: Sequence[Document],
    of: int,
    inputs: Sequence[Input],
    seen: list[set[bytes]],
) -> None:
    """DataError where an image of a shard has come before; seen: hashes of ids, by input."""
    for document in documents:
        image = document["image"]
        digest = hashlib.blake2b(image.encode(errors="surrogatepass"), digest_size=HASH).digest()
        for other, hashes in enumerate(seen[: of + 1]):
            if digest in hashes:
                raise DataError(
                    f"image {image!a:.120} of {shard.where} is in {inputs[other].url}, too: leave "
                    "it out of one (`lxscale shards subset --exclude`), and merge that"
                )
        seen[of].add(digest)


def _write_table(
    path: Path, shard: Shard, documents: Sequence[Document], encoder: SentenceEncoder
) -> None:
    """A shard's table with other numbers for words, answers and sets; members stay where they are.
    An answer that is in no input's table is left out, as it was before."""
    table = shard.table
    arrays = member_columns(table.image_objects, table.record_size, table.offset)
    if table.sample_offset is not None:
        arrays["sample_offset"] = np.asarray(table.sample_offset)
    save_arrays(path, {**arrays, **encoder.arrays(documents, lambda *_: None)})
