"""Checking a shard: its files against their hashes, its tar, table and manifest against each other.

A tar must hold what its table says, member by member, and nothing else: no other kind of member, no
byte between two of them or after the last.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError, NodeError, StoreError, explained, node_error, of_node
from shards.format.answers import answer_index, load_answers
from shards.format.arrays import map_arrays
from shards.format.check import check_record
from shards.format.foreign import scan
from shards.format.manifest import Manifest
from shards.format.members import RECORD, members_of
from shards.format.record import (
    ImageRecord,
    check_sentence,
    record_json,
    record_key,
    record_of,
)
from shards.format.sentences import Document, SentenceEncoder
from shards.format.shard_list import ShardInfo
from shards.format.table import BLOCK, Table, check_table, member_columns, open_table
from shards.format.tokenizer import make_tokenizer, parse_vocab
from shards.store import objects
from shards.store.stored import StoredFile, hash_file

# Bytes of an image's hash: that two of 10⁹ images have one by chance is less likely than 10⁻²⁰.
HASH = 16


@dataclass
class Check:
    """A check under way of a data set's shards."""

    place: str
    """Where its files are."""
    manifest: Manifest
    folder: Path
    """For fetched files."""
    problems: list[str] = field(default_factory=list)

    def fetch(self, file: StoredFile) -> Path | None:
        """The file on this machine; None, and a problem, where it is missing or damaged."""
        path = objects.local_path(file.url)
        try:
            if path is None:
                path = self.folder / file.url.rpartition("/")[2]
                with explained(self.folder), open(path, "wb") as f:
                    objects.download(file.url, f)
            if (actual := objects.file_size(str(path))) != file.size:
                self.problems.append(
                    f"{file.url} has {actual} bytes, the manifest says {file.size}"
                )
            elif hash_file(path) != file.sha256:
                self.problems.append(f"{file.url} has another sha256 than the manifest says")
            else:
                return path
        except (StoreError, NodeError):
            raise  # of the store or of this machine: nothing is known of the file
        except (DataError, OSError) as error:
            if isinstance(error, OSError) and of_node(error):
                raise node_error(file.url, error) from None
            self.problems.append(f"{file.url} cannot be read: {error}")
        return None

    def done_with(self, path: Path | None) -> None:
        """Free the space of a fetched file."""
        if path is not None and path.parent == self.folder:
            path.unlink(missing_ok=True)


def make_encoder(check: Check) -> SentenceEncoder | None:
    """What sentences were encoded with; None, and a problem, where that cannot be read."""
    manifest = check.manifest
    vocab, table = (check.fetch(f.at(check.place)) for f in (manifest.vocab, manifest.answers))
    tokens, answers = None, None
    try:
        if vocab:
            tokens = parse_vocab(vocab.read_bytes(), vocab)
            if not len(tokens) == manifest.vocab.count == manifest.schema.vocab_size:
                check.problems.append(f"{vocab.name} has {len(tokens)} tokens, not as the manifest")
        if table:
            answers = load_answers(table)
            if len(answers) != manifest.answers.count:
                check.problems.append(
                    f"{table.name} has {len(answers)} answers, not as the manifest"
                )
    except DataError as error:
        check.problems.append(str(error))
    if tokens is None or answers is None:
        return None
    return SentenceEncoder(
        manifest.schema, manifest.sources, make_tokenizer(tokens), answer_index(answers)
    )


def verify_shard(check: Check, shard: ShardInfo, encoder: SentenceEncoder | None) -> bytes:
    """Tar, table and manifest against each other; problems name shard, image and array. Returns a
    hash of HASH bytes of each image's id, in order, as far as they could be read."""
    images = bytearray()
    tar, table = check.fetch(shard.tar_at(check.place)), check.fetch(shard.table_at(check.place))
    if tar and table:
        try:
            found = open_table(table)
            verify_members = _verify_members if found.sample_offset is None else _verify_samples
            documents = verify_members(check, shard, tar, found, images)
            if documents is not None and _verify_counts(check, shard, documents) and encoder:
                _verify_table(check, shard, table, documents, encoder)
            if documents is not None and not check.problems:
                # What opening it would refuse, beside.
                check_table(found, shard, check.manifest, objects.join(check.place, shard.table))
        except DataError as error:
            check.problems.append(str(error))
    check.done_with(tar)
    check.done_with(table)
    return bytes(images)


def _verify_members(
    check: Check, shard: ShardInfo, path: Path, table: Table, images: bytearray
) -> list[Document] | None:
    """The JSON of all records of a tar; None where a record does not fit the table."""
    where = objects.join(check.place, shard.name)
    documents: list[Document] = []
    with open(path, "rb") as f:
        tar = np.memmap(f, dtype=np.uint8, mode="r")
        end = 0
        for i in range(len(table.image_objects)):
            try:
                record, end = _read_record(check.manifest, tar, table, i, end)
                check_record(record, check.manifest.schema)
            except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
                check.problems.append(f"{where}: record {i}: {error}")
                return None
            images += hashlib.blake2b(record.image.encode(), digest_size=HASH).digest()
            documents.append(json.loads(record_json(record)))
        if bool(np.any(tar[end:])):
            check.problems.append(f"{where}: there is something after the last record of the table")
    return documents


def _verify_samples(
    check: Check, shard: ShardInfo, path: Path, table: Table, images: bytearray
) -> list[Document] | None:
    """The same of a tar that others wrote: what a scan of it finds, and nothing else."""
    where = objects.join(check.place, shard.name)
    with open(path, "rb") as f:
        found = scan(f, check.manifest.schema, where)
    stored = member_columns(table.image_objects, table.record_size, table.offset)
    stored["sample_offset"] = np.asarray(table.sample_offset)
    for name, array in found.columns().items():
        if not np.array_equal(stored[name], array):
            check.problems.append(f"{where}: {name} of its table differs from what is in it")
            return None
    for document in found.documents:
        images += hashlib.blake2b(document["image"].encode(), digest_size=HASH).digest()
    return found.documents


def _verify_counts(check: Check, shard: ShardInfo, documents: list[Document]) -> bool:
    """Images and pairs against the manifest. False where a source is not in the manifest, so that
    the sentences cannot be encoded."""
    where = objects.join(check.place, shard.name)
    counted = dict.fromkeys(check.manifest.sources, 0)
    for document in documents:
        for sentence in document["sentences"]:
            if sentence["source"] not in counted:
                check.problems.append(f"{where}: source {sentence['source']!r} not in the manifest")
                return False
            counted[sentence["source"]] += 1
    found = (len(documents), sum(counted.values()), {k: n for k, n in counted.items() if n})
    if found != (shard.images, shard.pairs, shard.pairs_per_source):
        check.problems.append(f"{where}: images and pairs are {found}, not as in the manifest")
    return True


def _verify_table(
    check: Check,
    shard: ShardInfo,
    path: Path,
    documents: list[Document],
    encoder: SentenceEncoder,
) -> None:
    """The arrays of a table against what a build makes of its records' JSON."""
    table, stored = open_table(path), map_arrays(path)
    due = {
        **member_columns(table.image_objects, table.record_size, table.offset),
        **encoder.arrays(documents, lambda *_: None),
    }
    for name, array in due.items():
        if stored[name].dtype != array.dtype or not np.array_equal(stored[name], array):
            where = objects.join(check.place, shard.table)
            check.problems.append(f"{where}: {name} differs from what the records say")


def _read_record(
    manifest: Manifest, tar: NDArray[np.uint8], table: Table, i: int, end: int
) -> tuple[ImageRecord, int]:
    """Record i of the table, whose first header is due at `end`, and the end of its last member.

    ValueError, KeyError or the like says what does not fit.
    """
    schema = manifest.schema
    n, size = int(table.image_objects[i]), int(table.record_size[i])
    text = bytes(tar[int(table.offset[RECORD.name][i]) :][:size])
    document = json.loads(text)
    key, who = record_key(document["image"]), f"image {document['image']!r:.80}"
    found: dict[str, Any] = {}
    for member in members_of(schema):
        if member.name not in table.offset:
            raise ValueError(f"the table has no {member.offset_column}")
        offset = int(table.offset[member.name][i])
        length = n * member.object_bytes(schema) if member.columns else size
        name, stated = _header(tar, end)
        if name != f"{key}.{member.suffix}" or stated != length or offset != end + BLOCK:
            raise ValueError(
                f"{who}: member {name!r:.90} of {stated} bytes at {end + BLOCK}, "
                f"the table has .{member.suffix} of {length} bytes at {offset}"
            )
        if member.columns:
            found[member.name] = member.value(bytes(tar[offset : offset + length]), n, schema)
        end = offset + length + -length % BLOCK
        if bool(np.any(tar[offset + length : end])):
            raise ValueError(f"{who}: there is something between .{member.suffix} and what follows")
    if document["num_objects"] != n:
        raise ValueError(f"{who}: num_objects differs from the table")
    sentences = [
        check_sentence(s, f"{who}, sentence {j}") for j, s in enumerate(document["sentences"])
    ]
    record = record_of(document, sentences, found)
    if record_json(record) != text:
        raise ValueError(f"{who}: the JSON is not as a build writes it")
    return record, end


def _header(tar: np.ndarray, at: int) -> tuple[str, int]:
    """Name and size of the member whose header is at `at`; ValueError for no good header."""
    try:
        info = tarfile.TarInfo.frombuf(bytes(tar[at : at + BLOCK]), "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ValueError(f"no tar member at byte {at}: {error}") from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ValueError(f"{info.name!r:.90} is a link, a device or the like, and no plain file")
    return info.name, info.size
