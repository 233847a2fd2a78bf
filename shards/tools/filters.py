"""Which images of a data set, and which of their sentences, a subset has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.record import Report
from shards.format.sentences import Document
from shards.progress import Progress
from shards.tools.reading import Input, read_shards, read_table

_SHOWN = 8  # names of what there is, in a refusal


@dataclass(frozen=True)
class Filter:
    """What is kept; everything unless it says otherwise."""

    images: frozenset[str] | None = None
    """Ids of those that are kept. They are in memory, as those of `exclude`."""
    exclude: frozenset[str] = frozenset()
    """Ids of those that are not."""
    sources: frozenset[str] | None = None
    """Sets whose sentences are kept; images without any go."""
    split: str | None = None
    """Of the images that are kept."""

    @property
    def everything(self) -> bool:
        return self == Filter()

    def sentences(self, document: Document) -> list[Any]:
        """The sentences of a record that are kept; none where the image is not."""
        image = document["image"]
        if (self.images is not None and image not in self.images) or image in self.exclude:
            return []
        if self.split is not None and document.get("split") != self.split:
            return []
        found: list[Any] = document["sentences"]
        return [s for s in found if self.sources is None or s["source"] in self.sources]


def read_ids(path: Path) -> frozenset[str]:
    """The image ids of a file, one a line; DataError where there are none."""
    try:
        lines = path.read_bytes().decode().split("\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}: give a file of ids") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error}): give a file of ids") from None
    ids = frozenset(line.removesuffix("\r") for line in lines) - {""}
    if not ids:
        raise DataError(f"{path} is empty: give image ids, one a line")
    return ids


def check_filter(data: Input, keep: Filter) -> None:
    """DataError for sets that the data set does not have."""
    if unknown := sorted((keep.sources or frozenset()) - set(data.manifest.sources)):
        there = ", ".join(data.manifest.sources[:_SHOWN])
        raise DataError(f"{data.url} has no sentences of {unknown[0]!r:.80}: it has {there}")


@dataclass
class Seen:
    """What of a filter has been met with, to tell of names that nothing has."""

    keep: Filter
    ids: set[str]
    splits: set[str]

    @classmethod
    def nothing(cls, keep: Filter) -> Seen:
        return cls(keep, set(), set())

    def add(self, document: Document) -> None:
        image, split = document["image"], document.get("split")
        if image in (self.keep.images or ()) or image in self.keep.exclude:
            self.ids.add(image)
        if split is not None and len(self.splits) < _SHOWN:
            self.splits.add(split)

    def tell(self, data: Input, report: Report) -> None:
        """Report ids that no image has; DataError where none of the split has."""
        keep = self.keep
        for what, ids in (("images", keep.images or frozenset()), ("excluded", keep.exclude)):
            if missing := sorted(ids - self.ids):
                reason = f"{what}: ids that no image of the data set has"
                report.add(reason, missing[0], len(missing))
        if keep.split is not None and keep.split not in self.splits:
            there = ", ".join(sorted(self.splits)) or "none"
            raise DataError(
                f"no image of {data.url} is of split {keep.split!r:.80}: it has {there}"
            )


def kept_sentences(
    data: Input, keep: Filter, folder: Path, report: Report, progress: Progress
) -> list[NDArray[np.int32]]:
    """Of each shard, how many sentences each image keeps, 0 where it goes: 4 bytes an image in
    memory. All tars are read for it, unless everything is kept."""
    if keep.everything:
        out = []
        for number in range(len(data.manifest.shards)):
            sentences = np.diff(read_table(data, number, folder).image_sentences)
            out.append(sentences.astype(np.int32))
            progress("tables read", number + 1, len(data.manifest.shards))
        return out
    out, seen = [], Seen.nothing(keep)
    for shard in read_shards(data, folder, progress):
        counts = np.zeros(len(shard), dtype=np.int32)
        for i in range(len(shard)):
            document = shard.document(i)
            seen.add(document)
            counts[i] = len(keep.sentences(document))
        out.append(counts)
    seen.tell(data, report)
    return out


def fraction_of(image: str, seed: int) -> float:
    """A number in 0..1 that follows from an image's id and a seed, and looks drawn."""
    digest = hashlib.blake2b(f"{seed}:{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def part_of(fraction: float, ends: Sequence[float]) -> int:
    """Which of parts that end at `ends`, the last at 1, a number in 0..1 falls into."""
    return next(i for i, end in enumerate(ends) if fraction < end or i == len(ends) - 1)
