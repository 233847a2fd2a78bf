"""The manifest of a data set: what it consists of, with sizes, hashes and a fingerprint of it all.

Member offsets are in the shards' tables, whose hashes are here: a manifest grows with the shards,
not with the images. It is written last and is the only commit point of a build.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from shards.errors import DataError, NotFoundError
from shards.format.features import FeatureType, stored_width
from shards.format.shard_list import (
    INLINE,
    PAGE,
    Count,
    ShardInfo,
    ShardList,
    check_hash,
    check_name,
    parse_page,
)
from shards.store import objects
from shards.store.cache import local_file
from shards.store.stored import StoredFile, hash_file

FORMAT = "lxscale-1"
MANIFEST = "manifest.json"

# What memory is made for before anything of a record is read: none of them can be meant to be more.
_Objects = Annotated[int, Field(ge=0, le=1 << 16)]
_Width = Annotated[int, Field(ge=0, le=1 << 20)]
_Classes = Annotated[int, Field(ge=0, lt=1 << 31)]


@dataclass(frozen=True)
class Schema:
    """Sizes that every record of a data set keeps to."""

    feature_dim: _Width
    """Width of an RoI feature."""
    max_objects: _Objects
    """Most objects of an image."""
    labels: bool
    """Whether objects have detector labels."""
    num_object_classes: _Classes
    """Range of object labels; 0 without labels."""
    num_attribute_classes: _Classes
    max_tokens: _Objects
    """Longest sentence, with [CLS] and [SEP]."""
    vocab_size: _Classes
    feature_type: FeatureType = "fp16"
    """How features are stored; not in the manifest of fp16, which all were once."""
    sides: bool = False
    """Whether records are of two images each; in the manifest of such alone."""

    @property
    def stored_width(self) -> int:
        """Elements of an object's stored features."""
        return stored_width(self.feature_type, self.feature_dim)


@dataclass(frozen=True)
class FileInfo:
    """A small file beside the shards."""

    file: str
    """Its name."""
    sha256: str
    size: Count
    """In bytes."""
    count: Count
    """Its entries."""

    def at(self, url: str) -> StoredFile:
        """The file of the data set at `url`."""
        return StoredFile(objects.join(url, self.file), self.sha256, self.size)


@dataclass(frozen=True)
class Counts:
    """Totals of a data set."""

    images: Count
    pairs: Count
    sentences: dict[str, Count]
    """Pairs of each source."""


@dataclass(frozen=True)
class Pages:
    """Where the list of shards is, when it is not in the manifest itself."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    pages: tuple[FileInfo, ...]
    """Each of `count` shards, in order."""


@dataclass(frozen=True)
class Manifest:
    """A data set."""

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
    shards: ShardList
    pages: tuple[FileInfo, ...] = ()
    """The files that list the shards; none where the manifest does."""
    folder: str = dataclasses.field(default="", compare=False)
    """Of the build, beside the manifest: where all other files are; empty: right beside it. Not in
    the fingerprint, as equal data is equal wherever it is."""
    cleaned: int = dataclasses.field(default=0, compare=False)
    """How often the place was cleaned (clean.py); not in the fingerprint."""
    fence: str = dataclasses.field(default="", compare=False)
    """Of the last cleaning, like no other's; likewise."""

    def place(self, url: str) -> str:
        """Where the files of the data set at `url` are."""
        return objects.join(url, self.folder) if self.folder else url

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of everything else in the manifest."""
        return _fingerprint(self._document())

    @property
    def images(self) -> int:
        return self.counts.images

    @property
    def pairs(self) -> int:
        return self.counts.pairs

    def _document(self) -> dict[str, Any]:
        out: dict[str, Any] = {"format": FORMAT}
        for name in _SHARED:
            value = getattr(self, name)
            nested = isinstance(value, Schema | FileInfo | Counts)
            out[name] = dataclasses.asdict(value) if nested else value
        if self.schema.feature_type == "fp16":
            del out["schema"]["feature_type"]
        if not self.schema.sides:
            del out["schema"]["sides"]
        if self.pages:
            return out | {"shards": dataclasses.asdict(Pages(self.pages))}
        return out | {"shards": [dataclasses.asdict(s) for s in self.shards]}

    def to_json(self) -> bytes:
        """The bytes of manifest.json; equal manifests give equal bytes."""
        document = self._document() | {"fingerprint": self.fingerprint}
        rest = {name: getattr(self, name) for name in _REST}
        if any(rest.values()):
            document |= {name: value for name, value in rest.items() if value}
            document["checksum"] = _fingerprint(document)  # of what the fingerprint leaves out, too
        return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


@dataclass(frozen=True)
class _Document:
    """What is in manifest.json, without its fingerprint."""

    # Read as it was written: nothing is converted, and nothing may be missing or unknown.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    format: str
    name: str
    extractor: str
    schema: Schema
    sources: tuple[str, ...]
    question_sources: tuple[str, ...]
    vocab: FileInfo
    answers: FileInfo
    counts: Counts


@dataclass(frozen=True)
class _Whole(_Document):
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class _Paged(_Document):
    shards: Pages


_REST = ("folder", "cleaned", "fence")  # of a manifest, but not of its fingerprint
_SHARED = tuple(f.name for f in dataclasses.fields(_Document) if f.name != "format")
_WHOLE, _PAGED = TypeAdapter(_Whole), TypeAdapter(_Paged)


def _fingerprint(document: dict[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


# --- writing ------------------------------------------------------------------------------------


def with_pages(manifest: Manifest, folder: Path, stem: str = "shards-") -> Manifest:
    """The manifest, with the list of its shards in files in `folder` if it is a long one; stem: of
    their names."""
    shards = manifest.shards
    if len(shards) <= INLINE:
        return manifest
    pages = []
    for i in range(0, len(shards), PAGE):
        part = shards[i : i + PAGE]
        path = folder / f"{stem}{i // PAGE:06d}.safetensors"
        part.save_page(path)
        pages.append(FileInfo(path.name, hash_file(path), path.stat().st_size, len(part)))
    return dataclasses.replace(manifest, pages=tuple(pages))


# --- reading ------------------------------------------------------------------------------------


def load_manifest(url: str, cache: Path | None = None) -> Manifest:
    """The manifest of the data set at `url` (a folder or s3:// prefix). cache: where to keep its
    pages, if it has some.

    Raises DataError naming the object where it is absent, damaged or of another format.
    """
    where = objects.join(url, MANIFEST)
    try:
        data = objects.read_bytes(where)
        try:
            return parse_manifest(data, url, cache)
        except DataError:
            # Damaged on its way, perhaps: at rest, it comes the same again.
            again = objects.read_bytes(where)
            if again == data:
                raise
            return parse_manifest(again, url, cache)
    except NotFoundError as error:
        raise DataError(
            f"no data set at {url}: {error}; `lxscale shards build` makes one"
        ) from None


def parse_manifest(data: bytes, url: str, cache: Path | None = None) -> Manifest:
    """The manifest in these bytes, of the data set at `url`; see `load_manifest`."""
    where = objects.join(url, MANIFEST)
    document, rest = _parse(data, where)
    folder = rest.get("folder", "")
    pages: tuple[FileInfo, ...] = ()
    try:
        if folder:
            check_name(folder)
        if isinstance(document, _Whole):
            shards = ShardList.of(document.shards, document.sources)
        else:
            pages = document.shards.pages
            place = objects.join(url, folder) if folder else url
            shards = _read_pages(pages, place, cache, document.sources)
        shared = {name: getattr(document, name) for name in _SHARED}
        manifest = Manifest(**shared, shards=shards, pages=pages, **rest)
        _check(manifest)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{where} is not usable: {error}; build the data set again") from None
    return manifest


def given_file(place: str | Path, which: Literal["vocab", "answers"]) -> Path:
    """A vocabulary's or answer table's own path, or, where a data set's folder or URL is given, the
    path of that of the data set."""
    url = str(place)
    if not objects.exists(objects.join(url, MANIFEST)):
        return Path(place)
    manifest = load_manifest(url)
    info: FileInfo = getattr(manifest, which)
    return local_file(info.at(manifest.place(url)), table=True)


def tombstone(data: bytes) -> int | None:
    """How often a place was cleaned, where its manifest says that and nothing else: there was no
    data set then. None where it is anything else, a damaged manifest included."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.keys() != {"format", "cleaned", "fence"}:
        return None
    count = document["cleaned"]
    return count if document["format"] == FORMAT and type(count) is int else None


def new_tombstone(cleaned: int, fence: str) -> bytes:
    """The bytes of such a manifest."""
    return (json.dumps({"format": FORMAT, "cleaned": cleaned, "fence": fence}) + "\n").encode()


def _parse(data: bytes, url: str) -> tuple[_Whole | _Paged, dict[str, Any]]:
    """The document in `data`, with what its fingerprint leaves out; DataError naming `url` where it
    is damaged or of another format."""
    if tombstone(data) is not None:
        raise NotFoundError(f"{url} says that builds were removed there")
    try:
        document = json.loads(data)
        if not isinstance(document, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url} is not a manifest ({error}): build the data set again") from None
    if document.get("format") != FORMAT:
        raise DataError(
            f"{url} has format {document.get('format')!r:.80}, this lxscale reads {FORMAT!r}: "
            "use a matching version, or build the data set again"
        )
    checksum = document.pop("checksum", None)
    extended = any(name in document for name in _REST)
    if checksum != (_fingerprint(document) if extended else None):
        raise DataError(f"{url} is damaged (its checksum does not match): restore or rebuild it")
    stated = document.pop("fingerprint", None)
    rest = {name: document.pop(name) for name in _REST if name in document}
    if stated != _fingerprint(document):
        raise DataError(f"{url} is damaged (its fingerprint does not match): restore or rebuild it")
    kinds = {"folder": str, "cleaned": int, "fence": str}
    if any(type(value) is not kinds[name] for name, value in rest.items()):
        raise DataError(f"{url} is not usable: its folder is no name; build the data set again")
    paged = isinstance(document.get("shards"), dict)
    try:
        canonical = json.dumps(document)
        parsed = _PAGED.validate_json(canonical) if paged else _WHOLE.validate_json(canonical)
        return parsed, rest
    except ValidationError as error:
        problem = _first_problem(error)
        raise DataError(f"{url} is not usable: {problem}; build the data set again") from None


def _first_problem(error: ValidationError) -> str:
    """The first of a manifest's problems: where it is, and what it is."""
    first = error.errors(include_url=False)[0]
    where = "manifest"
    for part in first["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}"
    if first["type"] in ("missing", "unexpected_keyword_argument"):
        return f"{where}: {first['msg'].lower()}"
    return f"{where} is {first['input']!r:.60}: {first['msg'].lower()}"


def _read_pages(
    pages: tuple[FileInfo, ...], url: str, cache: Path | None, sources: tuple[str, ...]
) -> ShardList:
    lists = []
    for page in pages:
        check_name(page.file)
        check_hash(page.file, page.sha256)
        try:
            data = _read(page.at(url), cache)
        except NotFoundError as error:  # the data set is there, but not whole
            raise DataError(
                f"a page of the list of shards is missing: {error}; restore it, or build the data "
                "set again"
            ) from None
        shards = parse_page(data, sources, objects.join(url, page.file))
        if len(shards) != page.count:
            raise ValueError(f"{page.file} lists {len(shards)} shards, the manifest {page.count}")
        lists.append(shards)
    return ShardList.joined(lists, sources)


def _read(file: StoredFile, cache: Path | None) -> np.ndarray:
    """The bytes of a verified file."""
    if cache is not None:
        return np.fromfile(local_file(file, cache, table=True), dtype=np.uint8)
    data = objects.read_bytes(file.url)
    if problem := file.problem(len(data), hashlib.sha256(data).hexdigest()):
        raise DataError(f"{file.url} is damaged ({problem}): restore it or build it again")
    return np.frombuffer(data, dtype=np.uint8)


def _check(manifest: Manifest) -> None:
    """Things that hold in every manifest that a build has written; ValueError if one does not."""
    others = {f.file for f in (manifest.vocab, manifest.answers, *manifest.pages)}
    for file in (manifest.vocab, manifest.answers):
        check_name(file.file)
        check_hash(file.file, file.sha256)
    shards = manifest.shards
    shards.check()
    named = np.isin(np.concatenate([shards.name, shards.table]), np.asarray(sorted(others), "S"))
    if len(others) != 2 + len(manifest.pages) or named.any():
        raise ValueError("a file is named twice")
    if list(manifest.sources) != sorted(set(manifest.sources)):
        raise ValueError("the sources are not sorted and distinct")
    if not set(manifest.question_sources) <= set(manifest.sources):
        raise ValueError("a question source is not among the sources")
    totals = dict(zip(manifest.sources, shards.pairs_per_source.sum(0).tolist(), strict=True))
    counts = Counts(int(shards.images.sum()), int(shards.pairs.sum()), totals)
    if counts != manifest.counts:
        raise ValueError("the counts are not the sums over the shards")
