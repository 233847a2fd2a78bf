"""The manifest of a data set: what it consists of, with sizes, hashes and a fingerprint of it all.

Member offsets are in the shards' tables, whose hashes are here: a manifest grows with the shards,
not with the images. It is written last and is the only commit point of a build.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from shards.errors import DataError, NotFoundError
from shards.store import objects

FORMAT = "lxscale-1"
MANIFEST = "manifest.json"
# Objects of a data set lie flat beside their manifest: a name may not lead anywhere else.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True)
class Schema:
    """Sizes that every record of a data set keeps to.

    feature_dim: width of an RoI feature; max_objects: most objects of an image
    labels: whether objects have detector labels; num_*_classes: their ranges (0 without labels)
    max_tokens: sentence length with [CLS] and [SEP]; vocab_size: tokens of the vocabulary
    """

    feature_dim: int
    max_objects: int
    labels: bool
    num_object_classes: int
    num_attribute_classes: int
    max_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class FileInfo:
    """A small file beside the shards; `size` in bytes, `count` its entries."""

    file: str
    sha256: str
    size: int
    count: int


@dataclass(frozen=True)
class Counts:
    """Totals of a data set; `sentences`: pairs of each source."""

    images: int
    pairs: int
    sentences: dict[str, int]


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its tar, its table, and what they hold; sizes in bytes."""

    name: str
    size: int
    sha256: str
    table: str
    table_size: int
    table_sha256: str
    images: int
    pairs: int
    pairs_per_source: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """A data set. `sources` is sorted; `question_sources` are those with answers or of QA sets."""

    name: str
    extractor: str
    schema: Schema
    sources: tuple[str, ...]
    question_sources: tuple[str, ...]
    vocab: FileInfo
    answers: FileInfo
    counts: Counts
    shards: tuple[ShardInfo, ...]
    format: str = FORMAT

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of everything else in the manifest."""
        return _fingerprint(self._document())

    @property
    def num_answers(self) -> int:
        return self.answers.count

    @property
    def images(self) -> int:
        return self.counts.images

    @property
    def pairs(self) -> int:
        return self.counts.pairs

    def _document(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> bytes:
        """The bytes of manifest.json; equal manifests give equal bytes."""
        document = self._document() | {"fingerprint": self.fingerprint}
        return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def _fingerprint(document: dict[str, Any]) -> str:
    body = {k: v for k, v in document.items() if k != "fingerprint"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` (parsed JSON) as `kind`, checked; ValueError says where it is not of that kind."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        hints = typing.get_type_hints(kind)
        if wrong := set(hints) ^ set(value):
            raise ValueError(f"{where} has missing or unknown keys {sorted(wrong)}")
        return kind(**{k: _convert(value[k], hint, f"{where}.{k}") for k, hint in hints.items()})
    if origin in (tuple, types.GenericAlias) and isinstance(value, list):
        return tuple(_convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if kind is int and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise ValueError(f"{where} is {value!r:.60}")


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
    if document.pop("fingerprint", None) != _fingerprint(document):
        raise DataError(f"{url} is damaged (its fingerprint does not match): restore or rebuild it")
    try:
        manifest: Manifest = _convert(document, Manifest, "manifest")
        _check(manifest)
    except ValueError as error:
        raise DataError(f"{url} is not usable: {error}; build the data set again") from None
    return manifest


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
