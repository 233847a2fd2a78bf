"""Images that several data sets have: what is trained on must not be what is tested on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import DataError
from shards.format.manifest import load_manifest
from shards.format.members import RECORD
from shards.progress import Progress, no_progress
from shards.sources import tars
from shards.sources.image_ids import Collection, image_id
from shards.sources.vg_images import NO_VG_IMAGES, load_vg_images


@dataclass(frozen=True)
class Overlap:
    """The images that two data sets share."""

    url: str
    other: str
    images: tuple[str, ...]
    """Their ids (`shards.sources.image_ids`), sorted."""


def overlap(
    url: str,
    others: Sequence[str],
    *,
    vg_images: Path | None = None,
    numbers: Collection | None = None,
    progress: Progress = no_progress,
) -> list[Overlap]:
    """What a data set shares with each of the others, where it is anything. Images are compared by
    their ids, both of a record of two.

    vg_images: Visual Genome's image_data.json, by which its images are known that are COCO's, too.
    numbers: the collection of bare numbers. The ids of `others` are in memory, some 100 bytes each;
    all tars are read. DataError naming a manifest or tar that cannot be read.
    """
    vg = load_vg_images(vg_images) if vg_images else NO_VG_IMAGES

    def ids(place: str) -> Iterator[str]:
        for name in images_of(place, progress):
            yield vg.resolve(image_id(name, numbers))

    tested = [(other, set(ids(other))) for other in others]
    shared: list[set[str]] = [set() for _ in tested]
    for image in ids(url):
        for found, (_, images) in zip(shared, tested, strict=True):
            if image in images:
                found.add(image)
    return [
        Overlap(url, other, tuple(sorted(found)))
        for found, (other, _) in zip(shared, tested, strict=True)
        if found
    ]


def images_of(url: str, progress: Progress = no_progress) -> Iterator[str]:
    """The id of every image of a data set, as its source has it. All tars are read."""
    manifest = load_manifest(url)
    shards = manifest.shards.tars([(manifest.place(url), len(manifest.shards))])
    with tempfile.TemporaryDirectory() as room:
        for number, file in enumerate(shards):
            with tars.opened(file.url, Path(room)) as f:
                for sample in tars.samples(f, lambda suffix: suffix == RECORD.suffix):
                    yield from _named(sample.members.get(RECORD.suffix, b""), file.url)
            progress("shards read", number + 1, len(shards))


def _named(text: bytes, where: str) -> list[str]:
    try:
        document = json.loads(text)
        pictures = document.get("pictures") or [document]
        return [str(picture["image"]) for picture in pictures]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{where} has a record that names no image ({error}): `lxscale shards verify` says "
            "what is damaged"
        ) from None
