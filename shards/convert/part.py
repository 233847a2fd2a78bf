"""One part of a build → one shard: read, check, write, bring to its place, leave a receipt.

A part needs nothing but its arguments and the files of features, so it can be made by any process
on any machine that sees them, again and again: its bytes follow from the plan. The receipt is
written last. A build that was killed finds the receipts of what is whole, and makes the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from shards.convert.plan import FeatureFile, PlannedImage
from shards.errors import DataError
from shards.format.answers import answer_index
from shards.format.build import checked_json
from shards.format.check import check_record
from shards.format.features import FeatureType, Rounding
from shards.format.manifest import Schema
from shards.format.members import members_of
from shards.format.record import ImageRecord, Labels, Picture, Report
from shards.format.sentences import Document, SentenceEncoder
from shards.format.shard_list import ShardInfo
from shards.format.shard_writer import ShardWriter, write_table
from shards.format.staging import bring
from shards.format.tokenizer import make_tokenizer
from shards.sources import checks
from shards.sources.checks import PartError, checked
from shards.sources.regions import Entry, Reader, Regions
from shards.store import objects
from shards.store.stored import hash_file


@dataclass(frozen=True)
class PartSettings:
    """What all parts of a build share."""

    place: str
    """Where the shards go."""
    stem: str
    """Of their names, before the number."""
    digest: str
    """Of all that their bytes follow from: receipts of another one do not count."""
    schema: Schema
    tokens: list[str]
    sources: list[str]
    answers: list[str]
    skip_bad: bool
    room: Path | None
    """For files under way; None: the system's temporary folder."""

    def name(self, part: int) -> str:
        """Of a part's files, without their ends."""
        return f"{self.stem}{part:06d}"


@dataclass(frozen=True)
class Part:
    """What a part is made of."""

    number: int
    images: list[PlannedImage]
    files: Mapping[int, FeatureFile]
    """Those that its images are in, by number."""


@dataclass(frozen=True)
class Receipt:
    """What a part has become."""

    part: int
    digest: str
    shard: ShardInfo | None
    """None where no record of it was good."""
    max_objects: int = 0
    errors: Rounding = field(default_factory=Rounding)
    counts: dict[str, int] = field(default_factory=dict)
    """What was left out, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add_to(self, report: Report) -> None:
        for reason, count in self.counts.items():
            shown = self.examples[reason]
            report.add(reason, shown[0], count - len(shown) + 1)
            for example in shown[1:]:
                report.add(reason, example)


def _receipt_name(settings: PartSettings, part: int) -> str:
    return f"{settings.name(part)}.part.json"


def receipt_url(settings: PartSettings, part: int) -> str:
    return objects.join(settings.place, _receipt_name(settings, part))


def make_part(settings: PartSettings, part: Part) -> Receipt:
    """The shard of a part, made unless it is whole already.

    DataError naming file and record where one is bad, unless those are left out, and where room or
    rights are missing.
    """
    if receipt := _earlier(settings, part.number):
        return receipt
    with _workspace(settings) as folder:
        receipt, name = _make(settings, part, folder), _receipt_name(settings, part.number)
        (folder / name).write_bytes(_receipt_bytes(receipt))
        of_shard = [receipt.shard.name, receipt.shard.table] if receipt.shard else []
        for made in (*of_shard, name):
            bring(folder / made, objects.join(settings.place, made))
    return receipt


@contextlib.contextmanager
def _workspace(settings: PartSettings) -> Iterator[Path]:
    room = settings.room if settings.room and settings.room.is_dir() else None
    try:
        with tempfile.TemporaryDirectory(prefix="part-", dir=room) as folder:
            yield Path(folder)
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or room or tempfile.gettempdir()}: "
            f"{error.strerror or error}: give a folder with room that you may write to (--staging)"
        ) from error


def _make(settings: PartSettings, part: Part, folder: Path) -> Receipt:
    report, most, errors = Report(), 0, Rounding()
    feature_type = settings.schema.feature_type
    documents: list[Document] = []
    writer = ShardWriter(folder, f"{settings.name(part.number)}.tar", members_of(settings.schema))
    try:
        for record in read_records(
            part.files, part.images, settings.schema, settings.skip_bad, report, feature_type
        ):
            if feature_type == "uint8":
                record = replace(record, features=errors.stored(record.features))
            text = checked_json(record)
            writer.append(record, text)
            documents.append(json.loads(text))
            most = max(most, len(record.boxes))
        if not documents:
            writer.abort()
            return Receipt(part.number, settings.digest, None, 0, errors, *_told(report))
        tar = writer.close()
    except BaseException:
        writer.abort()
        raise
    shard = write_table(folder, tar, documents, _encoder(settings), _unknown)
    return Receipt(part.number, settings.digest, shard, most, errors, *_told(report))


def _told(report: Report) -> tuple[dict[str, int], dict[str, list[str]]]:
    return report.counts, report.examples


def _unknown(_document: Document, _text: str, _answer: str) -> None:
    """The plan has refused or counted them."""


_encoders: dict[str, SentenceEncoder] = {}


def _encoder(settings: PartSettings) -> SentenceEncoder:
    """Made once a process: a vocabulary takes a while."""
    if settings.digest not in _encoders:
        _encoders.clear()
        _encoders[settings.digest] = SentenceEncoder(
            settings.schema,
            settings.sources,
            make_tokenizer(settings.tokens),
            answer_index(settings.answers),
        )
    return _encoders[settings.digest]


# --- records ------------------------------------------------------------------------------------


def read_records(
    files: Mapping[int, FeatureFile],
    images: Iterable[PlannedImage],
    schema: Schema | None,
    skip_bad: bool,
    report: Report,
    feature_type: FeatureType = "fp16",
) -> Iterator[ImageRecord]:
    """The records of planned images, in order, checked against the schema if there is one. Features
    are of the type fp16, or as the files have them where another one is asked for."""
    with ExitStack() as stack:
        opened: dict[int, tuple[ExitStack, Reader]] = {}

        def regions(number: int, entry: Entry) -> Regions:
            file = files[number]
            if number not in opened:
                # Two, as the images of a pair may each be in a file of their own.
                if len(opened) == 2:
                    opened.pop(next(iter(opened)))[0].close()
                own = stack.enter_context(ExitStack())
                reader = own.enter_context(file.format.reader(file.url, file.options))
                opened[number] = own, reader
            return _regions(file, opened[number][1], entry, feature_type)

        for image in images:
            try:
                record = _record(image, regions)
                if schema:
                    check_record(record, schema)
            except DataError as error:
                if not skip_bad:
                    raise
                report.add("bad records", str(error))
                continue
            yield record


def _regions(file: FeatureFile, read: Reader, entry: Entry, feature_type: FeatureType) -> Regions:
    """The regions of an image, with features of the type that is stored."""
    try:
        found = read(entry)
        if found.image != entry.image:
            raise ValueError(
                f"image {found.image!r:.120} is where {entry.image!r:.120} was listed: "
                "leave files as they are during a build"
            )
        features = checked("features", checks.stored, found.features, feature_type)
        return replace(found, features=features)
    except DataError:
        raise
    except ValueError as error:
        part = f", {error.part}" if isinstance(error, PartError) else ""
        remedy = "" if "--skip-bad" in str(error) else "; or leave such out with --skip-bad"
        raise DataError(f"{file.url}, {entry.where}{part}: {error}{remedy}") from None


def _record(image: PlannedImage, regions: Callable[[int, Entry], Regions]) -> ImageRecord:
    first = regions(image.file, image.entry)
    record = ImageRecord(
        image=first.image,
        width=first.width,
        height=first.height,
        boxes=first.boxes,
        features=first.features,
        sentences=image.sentences,
        labels=first.labels,
        split=image.split,
    )
    return _of_two(record, first, regions(*image.second), image.name) if image.second else record


def _of_two(record: ImageRecord, first: Regions, second: Regions, name: str) -> ImageRecord:
    """The record of two images, of which one has the first's objects. DataError where they have
    not the same columns."""
    two = (first, second)
    labels = [r.labels for r in two if r.labels]
    if len(labels) == 1 or len({r.features.shape[1:] for r in two}) > 1:
        raise DataError(
            f"images {first.image!r:.80} and {second.image!r:.80} have features of two kinds: give "
            "all images those of one extractor, or leave such out with --skip-bad"
        )
    columns = [f.name for f in dataclasses.fields(Labels)]
    return replace(
        record,
        image=name,
        boxes=np.concatenate([r.boxes for r in two]),
        features=np.concatenate([r.features for r in two]),
        labels=Labels(*(np.concatenate([getattr(v, c) for v in labels]) for c in columns))
        if labels
        else None,
        sides=np.repeat(np.arange(2, dtype=np.uint8), [len(r.boxes) for r in two]),
        pictures=tuple(Picture(r.image, r.width, r.height) for r in two),
    )


# --- receipts -----------------------------------------------------------------------------------


def _receipt_bytes(receipt: Receipt) -> bytes:
    document = dataclasses.asdict(receipt)
    text = json.dumps(document, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({"receipt": document, "checksum": checksum}, sort_keys=True) + "\n").encode()


def _parse_receipt(data: bytes) -> Receipt | None:
    """None for what is no receipt, or a damaged one."""
    try:
        whole = json.loads(data)
        document = whole["receipt"]
        text = json.dumps(document, sort_keys=True)
        if whole["checksum"] != hashlib.sha256(text.encode()).hexdigest():
            return None
        shard, errors = document.pop("shard"), Rounding(**document.pop("errors"))
        info = None if shard is None else ShardInfo(**shard)
        return Receipt(**document, shard=info, errors=errors)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _earlier(settings: PartSettings, part: int) -> Receipt | None:
    """The receipt of a part that an earlier attempt has finished, where what it names is whole."""
    try:
        receipt = _parse_receipt(objects.read_bytes(receipt_url(settings, part)))
    except DataError:
        return None
    if receipt is None or (receipt.digest, receipt.part) != (settings.digest, part):
        return None
    shard = receipt.shard
    if shard is None:
        return receipt
    due = (
        (shard.name, shard.size, shard.sha256),
        (shard.table, shard.table_size, shard.table_sha256),
    )
    whole = all(_whole(objects.join(settings.place, n), size, sha) for n, size, sha in due)
    return receipt if whole else None


def _whole(url: str, size: int, sha256: str) -> bool:
    """Whether a file is as it was written; in a store, by its size alone: an upload is whole there
    or not at all, and every reader hashes it."""
    try:
        if objects.file_size(url) != size:
            return False
    except DataError:
        return False
    path = objects.local_path(url)
    return path is None or hash_file(path) == sha256
