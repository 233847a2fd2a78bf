"""A data set that records are added to: what it fixes, and which images it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError, NotFoundError
from shards.format.answers import load_answers
from shards.format.build import BuildSettings
from shards.format.manifest import MANIFEST, Manifest, parse_manifest, tombstone
from shards.format.publish import is_index
from shards.format.tokenizer import load_vocab
from shards.progress import Progress
from shards.sources import tars
from shards.store import objects
from shards.store.create import check_conditions


@dataclass(frozen=True)
class Existing:
    """The data set at a place."""

    manifest: Manifest
    tag: str
    """Of its manifest, which the longer one replaces."""
    place: str
    """Where its shards are, and the new ones go."""
    tokens: list[str]
    answers: list[str]


def existing(out: str) -> Existing:
    """The data set at `out`; DataError where there is none, or none that can be added to."""
    data, tag = b"", ""
    with suppress(NotFoundError):
        data, tag = objects.read_tagged(objects.join(out, MANIFEST))
    if not data or tombstone(data) is not None:
        raise DataError(f"there is no data set at {out} to append to: build one without --append")
    manifest = parse_manifest(data, out)
    if is_index(manifest):
        raise DataError(
            f"the data set at {out} is an index of tars that others wrote: `lxscale shards subset` "
            "copies it to one of our own, to which records can be added"
        )
    if not manifest.folder:
        raise DataError(
            f"the data set at {out} is of an older layout: `lxscale shards migrate` makes one of "
            "the present layout, to which records can be added"
        )
    check_conditions(out)
    place = manifest.place(out)
    return Existing(
        manifest,
        tag,
        place,
        load_vocab(objects.join(place, manifest.vocab.file)),
        load_answers(objects.join(place, manifest.answers.file)),
    )


def check_alike(found: Existing, settings: BuildSettings) -> None:
    """DataError where what is to be added is of another kind than what is there."""
    there = found.manifest
    if settings.extractor != there.extractor:
        raise DataError(
            f"the data set has features of {there.extractor!r:.80}, not of "
            f"{settings.extractor!r:.80}, which are no substitutes: build a data set of them, or "
            "say with --extractor that they are the same"
        )


def keys(found: Existing, room: Path, progress: Progress) -> Iterator[str]:
    """The key of every image of a data set (`shards.format.record.record_key`). Its tars are read
    for them, a remote one as a copy in `room`: about as long as a check of the data set takes."""
    shards = found.manifest.shards
    for done, shard in enumerate(shards):
        progress("shards of the data set read", done, len(shards))
        with tars.opened(objects.join(found.place, shard.name), room) as f:
            count = 0
            for sample in tars.samples(f, lambda _suffix: False):
                count += 1
                yield sample.key
        if count != shard.images:
            raise DataError(
                f"{found.place}/{shard.name} has {count} images, not {shard.images} as the "
                "manifest says: `lxscale shards verify` says what is damaged"
            )
    progress("shards of the data set read", len(shards), len(shards))
