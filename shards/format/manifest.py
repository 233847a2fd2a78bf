"""The manifest of a data set: what it consists of, with sizes, hashes and a fingerprint of it all.

Member offsets are in the shards' tables, whose hashes are here: a manifest grows with the shards,
not with the images. It is written last and is the only commit point of a build.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from pydantic import ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from shards.errors import DataError, NotFoundError
from shards.store import objects
from shards.store.stored import StoredFile

FORMAT = "lxscale-1"
MANIFEST = "manifest.json"
# Objects of a data set lie flat beside their manifest: a name may not lead anywhere else.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Schema:
    """Sizes that every record of a data set keeps to."""

    feature_dim: NonNegativeInt
    """Width of an RoI feature."""
    max_objects: NonNegativeInt
    """Most objects of an image."""
    labels: bool
    """Whether objects have detector labels."""
    num_object_classes: NonNegativeInt
    """Range of object labels; 0 without labels."""
    num_attribute_classes: NonNegativeInt
    max_tokens: NonNegativeInt
    """Longest sentence, with [CLS] and [SEP]."""
    vocab_size: NonNegativeInt


@dataclass(frozen=True)
class FileInfo:
    """A small file beside the shards."""

    file: str
    """Its name."""
    sha256: str
    size: NonNegativeInt
    """In bytes."""
    count: NonNegativeInt
    """Its entries."""

    def at(self, url: str) -> StoredFile:
        """The file of the data set at `url`."""
        return StoredFile(objects.join(url, self.file), self.sha256, self.size)


@dataclass(frozen=True)
class Counts:
    """Totals of a data set."""

    images: NonNegativeInt
    pairs: NonNegativeInt
    sentences: dict[str, NonNegativeInt]
    """Pairs of each source."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its tar, its table, and what they hold; sizes in bytes."""

    name: str
    """Of the tar."""
    size: NonNegativeInt
    sha256: str
    table: str
    table_size: NonNegativeInt
    table_sha256: str
    images: NonNegativeInt
    pairs: NonNegativeInt
    pairs_per_source: dict[str, NonNegativeInt]

    def tar_at(self, url: str) -> StoredFile:
        """The tar of the data set at `url`."""
        return StoredFile(objects.join(url, self.name), self.sha256, self.size)

    def table_at(self, url: str) -> StoredFile:
        """The table of the data set at `url`."""
        return StoredFile(objects.join(url, self.table), self.table_sha256, self.table_size)


@dataclass(frozen=True)
class Manifest:
    """A data set."""

    # Read as it was written: nothing is converted, and nothing may be missing or unknown.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    name: str
    extractor: str
    """What made the features."""
    schema: Schema
    sources: tuple[str, ...]
    """Sorted."""
    question_sources: tuple[str, ...]
    """The sources with answers or of QA sets."""
    vocab: FileInfo
    answers: FileInfo
    counts: Counts
    shards: tuple[ShardInfo, ...]
    format: str = FORMAT

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of everything else in the manifest."""
        return _fingerprint(_canonical(dataclasses.asdict(self)))

    @property
    def images(self) -> int:
        return self.counts.images

    @property
    def pairs(self) -> int:
        return self.counts.pairs

    def to_json(self) -> bytes:
        """The bytes of manifest.json; equal manifests give equal bytes."""
        document = dataclasses.asdict(self)
        document["fingerprint"] = _fingerprint(_canonical(document))
        return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


_ADAPTER = TypeAdapter(Manifest)


def _canonical(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _fingerprint(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()


def parse_manifest(data: bytes, url: str) -> Manifest:
    """The manifest in `data`; DataError naming `url` where it is damaged or of another format."""
    try:
        document = json.loads(data)
        if not isinstance(document, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise DataError(f"{url} is not a manifest ({error}): build the data set again") from None
    if document.get("format") != FORMAT:
        raise DataError(
            f"{url} has format {document.get('format')!r}, this lxscale reads {FORMAT!r}: "
            "use a matching version, or build the data set again"
        )
    stated = document.pop("fingerprint", None)
    canonical = _canonical(document)
    if stated != _fingerprint(canonical):
        raise DataError(f"{url} is damaged (its fingerprint does not match): restore or rebuild it")
    try:
        manifest = _ADAPTER.validate_json(canonical)
        _check(manifest)
    except ValidationError as error:
        problem = _first_problem(error)
        raise DataError(f"{url} is not usable: {problem}; build the data set again") from None
    except ValueError as error:
        raise DataError(f"{url} is not usable: {error}; build the data set again") from None
    return manifest


def _first_problem(error: ValidationError) -> str:
    """The first of a manifest's problems: where it is, and what it is."""
    first = error.errors(include_url=False)[0]
    where = "manifest"
    for part in first["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}"
    if first["type"] in ("missing", "unexpected_keyword_argument"):
        return f"{where}: {first['msg'].lower()}"
    return f"{where} is {first['input']!r:.60}: {first['msg'].lower()}"


def _check(manifest: Manifest) -> None:
    """Things that hold in every manifest that a build has written; ValueError if one does not."""
    files = [(f.file, f.sha256) for f in (manifest.vocab, manifest.answers)]
    files += [(s.name, s.sha256) for s in manifest.shards]
    files += [(s.table, s.table_sha256) for s in manifest.shards]
    for name, sha256 in files:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r:.80} is not a plain file name")
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"the sha256 of {name} is {sha256!r:.80}")
    if len({name for name, _ in files}) != len(files):
        raise ValueError("a file is named twice")
    if list(manifest.sources) != sorted(set(manifest.sources)):
        raise ValueError("the sources are not sorted and distinct")
    if not set(manifest.question_sources) <= set(manifest.sources):
        raise ValueError("a question source is not among the sources")
    totals = dict.fromkeys(manifest.sources, 0)
    for shard in manifest.shards:
        if not set(shard.pairs_per_source) <= set(totals):
            raise ValueError(f"{shard.name} has sources that the data set has not")
        for source, pairs in shard.pairs_per_source.items():
            totals[source] += pairs
        if sum(shard.pairs_per_source.values()) != shard.pairs:
            raise ValueError(f"the pairs per source of {shard.name} do not add up")
    counts = Counts(
        sum(s.images for s in manifest.shards), sum(s.pairs for s in manifest.shards), totals
    )
    if counts != manifest.counts:
        raise ValueError("the counts are not the sums over the shards")


def load_manifest(url: str) -> Manifest:
    """The manifest of the data set at `url` (a folder or s3:// prefix).

    Raises DataError naming the object where it is absent, damaged or of another format.
    """
    where = objects.join(url, MANIFEST)
    try:
        data = objects.read_bytes(where)
        try:
            return parse_manifest(data, where)
        except DataError:
            # Damaged on its way, perhaps: at rest, it comes the same again.
            again = objects.read_bytes(where)
            if again == data:
                raise
            return parse_manifest(again, where)
    except NotFoundError as error:
        raise DataError(
            f"no data set at {url}: {error}; `lxscale shards build` makes one"
        ) from None
