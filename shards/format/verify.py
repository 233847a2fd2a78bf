"""Checking a whole data set: every byte against its hash, every member against its table."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from shards.errors import DataError
from shards.format.answers import answer_index, load_answers
from shards.format.build import table_arrays
from shards.format.manifest import FileInfo, Manifest, ShardInfo, load_manifest
from shards.format.record import (
    ImageRecord,
    Report,
    check_record,
    check_sentence,
    labels_bytes,
    labels_from_bytes,
    record_json,
    record_key,
)
from shards.format.table import Table, open_table
from shards.format.tokenizer import make_tokenizer, parse_vocab
from shards.store import objects
from shards.store.cache import hash_file

BLOCK = 512


def verify(url: str | Path, progress: Callable[[str], None] | None = None) -> list[str]:
    """Everything that is wrong with the data set at `url`, one sentence each; empty when it is
    whole. Object storage is read shard by shard through the system's temporary folder, past the
    cache. DataError is raised only where the manifest cannot be read.
    """
    say = progress or (lambda text: None)
    manifest = load_manifest(str(url))
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lxscale-verify-") as folder:
        place = _Place(str(url), Path(folder), problems)
        tokenizer, answers = _vocabulary(place, manifest)
        images: set[str] = set()
        for shard in manifest.shards:
            before = len(problems)
            _verify_shard(place, manifest, shard, tokenizer, answers, images)
            found = len(problems) - before
            say(f"{shard.name}: {f'{found} problems' if found else 'whole'}")
    return problems


class _Place:
    """Where files are taken from, and where problems go."""

    def __init__(self, url: str, folder: Path, problems: list[str]) -> None:
        self.url, self.folder, self.problems = url, folder, problems

    def fetch(self, name: str, size: int, sha256: str) -> Path | None:
        """The file on this machine; None, and a problem, where it is missing or damaged."""
        url = objects.join(self.url, name)
        path = objects.local_path(url)
        try:
            if path is None:
                path = self.folder / name
                with open(path, "wb") as f:
                    objects.download(url, f)
            if (actual := objects.file_size(str(path))) != size:
                self.problems.append(f"{url} has {actual} bytes, the manifest says {size}")
            elif hash_file(path) != sha256:
                self.problems.append(f"{url} has another sha256 than the manifest says")
            else:
                return path
        except (DataError, OSError) as error:
            self.problems.append(f"{url} cannot be read: {error}")
        return None

    def done_with(self, path: Path | None) -> None:
        """Free the space of a fetched file."""
        if path is not None and path.parent == self.folder:
            path.unlink(missing_ok=True)


def _vocabulary(
    place: _Place, manifest: Manifest
) -> tuple[Tokenizer | None, dict[str, int] | None]:
    def fetch(info: FileInfo) -> Path | None:
        return place.fetch(info.file, info.size, info.sha256)

    tokenizer, answers = None, None
    try:
        if path := fetch(manifest.vocab):
            tokens = parse_vocab(path.read_bytes(), path)
            tokenizer = make_tokenizer(tokens)
            if not len(tokens) == manifest.vocab.count == manifest.schema.vocab_size:
                place.problems.append(f"{path.name} has {len(tokens)} tokens, not as the manifest")
        if path := fetch(manifest.answers):
            table = load_answers(path)
            answers = answer_index(table)
            if len(table) != manifest.answers.count:
                place.problems.append(f"{path.name} has {len(table)} answers, not as the manifest")
    except DataError as error:
        place.problems.append(str(error))
    return tokenizer, answers


def _verify_shard(
    place: _Place,
    manifest: Manifest,
    shard: ShardInfo,
    tokenizer: Tokenizer | None,
    answers: dict[str, int] | None,
    images: set[str],
) -> None:
    tar_path = place.fetch(shard.name, shard.size, shard.sha256)
    table_path = place.fetch(shard.table, shard.table_size, shard.table_sha256)
    if tar_path and table_path:
        try:
            table = open_table(table_path)
            _verify_members(place, manifest, shard, tar_path, table, tokenizer, answers, images)
        except DataError as error:
            place.problems.append(str(error))
    place.done_with(tar_path)
    place.done_with(table_path)


def _verify_members(
    place: _Place,
    manifest: Manifest,
    shard: ShardInfo,
    tar_path: Path,
    table: Table,
    tokenizer: Tokenizer | None,
    answers: dict[str, int] | None,
    images: set[str],
) -> None:
    """Tar, table and manifest against each other; problems name shard, image and array."""
    where = objects.join(place.url, shard.name)
    documents: list[dict[str, Any]] = []
    with open(tar_path, "rb") as f:
        tar = np.memmap(f, dtype=np.uint8, mode="r")
        end = 0
        for i in range(len(table.image_objects)):
            try:
                record, end = _read_record(tar, table, i, end, manifest)
                check_record(record, manifest.schema)
                if record.image in images:
                    raise ValueError(f"image {record.image!r} comes twice in the data set")
            except (ValueError, KeyError, TypeError, IndexError) as error:
                place.problems.append(f"{where}: record {i}: {error}")
                return
            images.add(record.image)
            documents.append(json.loads(record_json(record)))
        if bool(np.any(tar[end:])):
            place.problems.append(f"{where}: there is something after the last record of the table")
    counted = dict.fromkeys(manifest.sources, 0)
    for document in documents:
        for sentence in document["sentences"]:
            if sentence["source"] not in counted:
                place.problems.append(f"{where}: source {sentence['source']!r} not in the manifest")
                return
            counted[sentence["source"]] += 1
    found = (len(documents), sum(counted.values()), {k: n for k, n in counted.items() if n})
    if found != (shard.images, shard.pairs, shard.pairs_per_source):
        place.problems.append(f"{where}: images and pairs are {found}, not as in the manifest")
    if tokenizer is None or answers is None:
        return
    offsets = {
        "objects": table.image_objects.tolist(),
        "record": table.record_offset.tolist(),
        "record_size": table.record_size.tolist(),
        "boxes": table.boxes_offset.tolist(),
        "features": table.features_offset.tolist(),
    }
    if manifest.schema.labels and table.labels_offset is not None:
        offsets["labels"] = table.labels_offset.tolist()
    due = table_arrays(
        documents,
        offsets,
        manifest.sources,
        tokenizer,
        answers,
        manifest.schema,
        Report(),
        must_know=False,
    )
    for name, array in due.items():
        stored = getattr(table, name)
        if stored is None or stored.dtype != array.dtype or not np.array_equal(stored, array):
            table_url = objects.join(place.url, shard.table)
            place.problems.append(f"{table_url}: {name} differs from what the records say")


def _read_record(
    tar: np.ndarray, table: Table, i: int, end: int, manifest: Manifest
) -> tuple[ImageRecord, int]:
    """Record i of the table, whose first header is due at `end`, and the end of its last member.

    ValueError, KeyError or the like says what does not fit.
    """
    schema = manifest.schema
    n = int(table.image_objects[i])
    size = int(table.record_size[i])
    text = bytes(tar[int(table.record_offset[i]) :][:size])
    document = json.loads(text)
    record_id = document["image"]
    members = [("json", int(table.record_offset[i]), size)]
    members.append(("boxes.f32", int(table.boxes_offset[i]), n * 16))
    if schema.labels:
        if table.labels_offset is None:
            raise ValueError("the table has no labels_offset")
        members.append(("labels.bin", int(table.labels_offset[i]), n * 16))
    members.append(("features.f16", int(table.features_offset[i]), n * schema.feature_dim * 2))
    payloads: dict[str, bytes] = {}
    for suffix, offset, length in members:
        name, stated = _header(tar, end)
        if name != f"{record_key(record_id)}.{suffix}" or stated != length or offset != end + BLOCK:
            raise ValueError(
                f"image {record_id!r:.80}: member {name!r:.90} of {stated} bytes at {end + BLOCK}, "
                f"the table has .{suffix} of {length} bytes at {offset}"
            )
        payloads[suffix] = bytes(tar[offset : offset + length])
        end = offset + length + -length % BLOCK
    if document["num_objects"] != n:
        raise ValueError(f"image {record_id!r:.80}: num_objects differs from the table")
    record = ImageRecord(
        image=record_id,
        width=document["width"],
        height=document["height"],
        boxes=np.frombuffer(payloads["boxes.f32"], "<f4").reshape(n, 4),
        features=np.frombuffer(payloads["features.f16"], "<f2").reshape(n, schema.feature_dim),
        sentences=tuple(
            check_sentence(s, f"image {record_id!r:.80}, sentence {j}")
            for j, s in enumerate(document["sentences"])
        ),
        labels=labels_from_bytes(payloads["labels.bin"], n) if schema.labels else None,
        split=document.get("split"),
    )
    if record_json(record) != text or (
        record.labels and labels_bytes(record.labels) != payloads["labels.bin"]
    ):
        raise ValueError(f"image {record_id!r:.80}: the JSON is not as a build writes it")
    return record, end


def _header(tar: np.ndarray, at: int) -> tuple[str, int]:
    """Name and size of the member whose header is at `at`; ValueError for no good header."""
    try:
        info = tarfile.TarInfo.frombuf(bytes(tar[at : at + BLOCK]), "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ValueError(f"no tar member at byte {at}: {error}") from None
    return info.name, info.size


def info(url: str | Path) -> str:
    """A summary of a data set for people."""
    m = load_manifest(str(url))
    size = sum(s.size + s.table_size for s in m.shards)
    labels = "no labels"
    if m.schema.labels:
        objects, attributes = m.schema.num_object_classes, m.schema.num_attribute_classes
        labels = f"{objects} object and {attributes} attribute classes"
    lines = [
        f"name         {m.name}",
        f"extractor    {m.extractor}",
        f"fingerprint  {m.fingerprint}",
        f"images       {m.images:,}",
        f"pairs        {m.pairs:,}",
        f"shards       {len(m.shards)} ({size / 1e6:,.1f} MB)",
        f"objects      up to {m.schema.max_objects} of width {m.schema.feature_dim}, {labels}",
        f"vocabulary   {m.schema.vocab_size:,} tokens, sentences of up to {m.schema.max_tokens}",
        f"answers      {m.num_answers:,}",
        *_sources(m, m.sources),
    ]
    return "\n".join(lines)


def _sources(m: Manifest, sources: Sequence[str]) -> list[str]:
    return [
        f"source       {s}: {m.counts.sentences[s]:,} pairs"
        f"{' (questions)' if s in m.question_sources else ''}"
        for s in sources
    ]
