"""A part of a data set as one of its own, or all of it dealt to several.

Records keep their bytes where their sentences are unchanged; vocabulary and answer table stay, so
that parts can be mixed again and models go from one to another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.manifest import Manifest
from shards.format.publish import commit_point, delivery
from shards.format.record import Report, record_json
from shards.format.sentences import Document
from shards.format.staging import staging_folder
from shards.progress import Progress, no_progress
from shards.store import objects
from shards.tools.copying import scratch
from shards.tools.filters import (
    Filter,
    Seen,
    check_filter,
    fraction_of,
    kept_sentences,
    part_of,
)
from shards.tools.reading import Input, Shard, open_input, read_shards
from shards.tools.rewriting import Rewriting, SetWriter


@dataclass(frozen=True)
class Choice:
    """Which images a subset has."""

    keep: Filter = field(default_factory=Filter)
    sample: int | None = None
    """So many of those, drawn with `seed`. The tars are then read twice where `keep` says
    something, else those alone that have one."""
    seed: int = 0
    limit: int | None = None
    """The first so many, in the order of the data set."""


@dataclass(frozen=True)
class Dealing:
    """Which part an image goes to: by the hash of its id, or the first part has those listed."""

    weights: tuple[float, ...] = ()
    """Shares of the parts, against one another."""
    seed: int = 0
    images: frozenset[str] | None = None
    """Ids of the first of two parts, in place of weights."""

    def part(self) -> Callable[[str], int]:
        """Image id -> number of its part. It follows from id, seed and weights alone."""
        if self.images is not None:
            first = self.images
            return lambda image: 0 if image in first else 1
        total = sum(self.weights)
        ends = [end / total for end in accumulate(self.weights)]
        return lambda image: part_of(fraction_of(image, self.seed), ends)


@dataclass(frozen=True)
class Amount:
    """What a data set would have."""

    images: int
    pairs: int
    bytes: int
    """About."""


def subset(
    url: str,
    out: str,
    choice: Choice,
    how: Rewriting,
    *,
    overwrite: bool = False,
    staging: Path | None = None,
    report: Report | None = None,
    progress: Progress = no_progress,
) -> Manifest:
    """Write the chosen records of the data set at `url` to `out`, as a build of them with its
    vocabulary and answers would.

    staging: room for a shard under way, where `out` is no folder. report: collects ids that no
    image has. Raises DataError naming what is missing or damaged, and where nothing is left; the
    output is then as it was before.
    """
    before, report = commit_point(out, overwrite), report or Report()
    keep, left = choice.keep, choice.limit
    with ExitStack() as stack:
        folder = stack.enter_context(staging_folder(out, staging))
        data = open_input(url, folder)
        check_filter(data, keep)
        chosen = None
        if choice.sample is not None:
            kept = kept_sentences(data, keep, folder, report, progress)
            chosen = _drawn(data, choice, kept)
        build = stack.enter_context(delivery(out, before))
        writer = SetWriter(build, folder, data, how)
        stack.callback(writer.abort)
        seen = Seen.nothing(keep)
        wanted = None if chosen is None else [bool(c.any()) for c in chosen]
        for shard, i in _records(data, folder, progress, wanted):
            if chosen is None or chosen[shard.number][i]:
                document = shard.document(i)
                seen.add(document)
                if sentences := keep.sentences(document):
                    _append(writer, shard, i, document, sentences)
                    left = None if left is None else left - 1
                    if left == 0:
                        break
        if chosen is None and left != 0:
            seen.tell(data, report)
        return build.commit(writer.finish(progress))


def subset_amount(
    url: str,
    choice: Choice,
    *,
    staging: Path | None = None,
    report: Report | None = None,
    progress: Progress = no_progress,
) -> Amount:
    """What `subset` would write; tars are read as for it, and nothing is written."""
    with scratch(staging) as folder:
        data = open_input(url, folder)
        check_filter(data, choice.keep)
        kept = kept_sentences(data, choice.keep, folder, report or Report(), progress)
        sentences = np.concatenate(kept)
        if choice.sample is not None:
            sentences = np.where(np.concatenate(_drawn(data, choice, kept)), sentences, 0)
        sentences = sentences[sentences > 0][: choice.limit]
        return _amount(data, len(sentences), int(sentences.sum()))


def split(
    url: str,
    outs: Sequence[str],
    dealing: Dealing,
    how: Sequence[Rewriting],
    *,
    overwrite: bool = False,
    staging: Path | None = None,
    report: Report | None = None,
    progress: Progress = no_progress,
) -> list[Manifest]:
    """Deal all images of the data set at `url` to data sets at `outs`, each image to one.

    Raises DataError as `subset`, and where a part has no image. All parts are whole before the
    first is committed.
    """
    _check_parts(outs, dealing)
    befores = [commit_point(out, overwrite) for out in outs]
    with ExitStack() as stack:
        folders = [stack.enter_context(staging_folder(out, staging)) for out in outs]
        data, part = open_input(url, folders[0]), dealing.part()
        seen = Seen.nothing(Filter(images=dealing.images))
        writers = []
        for out, before, folder, of_part in zip(outs, befores, folders, how, strict=True):
            build = stack.enter_context(delivery(out, before))
            writers.append(SetWriter(build, folder, data, of_part))
            stack.callback(writers[-1].abort)
        for shard, i in _records(data, folders[0], progress):
            document = shard.document(i)
            seen.add(document)
            writer = writers[part(document["image"])]
            _append(writer, shard, i, document, document["sentences"])
        seen.tell(data, report or Report())
        ready = [writer.finish(progress) for writer in writers]
        done: list[Manifest] = []
        for writer, manifest in zip(writers, ready, strict=True):
            try:
                done.append(writer.build.commit(manifest))
            except DataError as error:
                there = f"; {', '.join(outs[: len(done)])} is whole" if done else ""
                raise DataError(f"{error}{there}") from None
        return done


def split_amounts(
    url: str,
    outs: Sequence[str],
    dealing: Dealing,
    *,
    staging: Path | None = None,
    progress: Progress = no_progress,
) -> list[Amount]:
    """What `split` would write; the tars are read for it."""
    _check_parts(outs, dealing)
    images, pairs = [0] * len(outs), [0] * len(outs)
    with scratch(staging) as folder:
        data, part = open_input(url, folder), dealing.part()
        for shard, i in _records(data, folder, progress):
            document = shard.document(i)
            number = part(document["image"])
            images[number] += 1
            pairs[number] += len(document["sentences"])
    return [_amount(data, *of_part) for of_part in zip(images, pairs, strict=True)]


# --- parts of them ------------------------------------------------------------------------------


def _records(
    data: Input, folder: Path, progress: Progress, wanted: Sequence[bool] | None = None
) -> Iterator[tuple[Shard, int]]:
    """Every record of the shards that are wanted: its shard, and its place in that."""
    for shard in read_shards(data, folder, progress, wanted):
        for i in range(len(shard)):
            yield shard, i


def _append(
    writer: SetWriter, shard: Shard, i: int, document: Document, sentences: list[Any]
) -> None:
    """Write a record with those of its sentences that are kept."""
    record = shard.record(i, document | {"sentences": sentences})
    as_it_is = not shard.foreign and len(sentences) == len(document["sentences"])
    writer.append(record, shard.text(i) if as_it_is else record_json(record))


def _drawn(data: Input, choice: Choice, kept: list[NDArray[np.int32]]) -> list[NDArray[np.bool_]]:
    """Of each shard, which images are in the sample; kept: sentences that each image keeps."""
    there, wanted = np.flatnonzero(np.concatenate(kept)), choice.sample or 0
    if wanted > len(there):
        raise DataError(
            f"{data.url} has {len(there):,} images to draw from, and {wanted:,} are asked for: ask "
            "for fewer"
        )
    drawn = np.zeros(sum(map(len, kept)), dtype=bool)
    drawn[there[random.Random(choice.seed).sample(range(len(there)), wanted)]] = True
    return np.split(drawn, np.cumsum([len(k) for k in kept])[:-1])


def _check_parts(outs: Sequence[str], dealing: Dealing) -> None:
    count = 2 if dealing.images is not None else len(dealing.weights)
    if len(outs) < 2 or len(outs) != count:
        raise DataError(
            f"{len(outs)} places for {count} parts: give each part of two or more its --out"
        )
    if len({objects.local_path(out) or out for out in outs}) != len(outs):
        raise DataError("two parts have the same --out: give each a place of its own")
    if any(not 0 < w < float("inf") for w in dealing.weights):
        raise DataError(f"shares of {dealing.weights}: give numbers above 0")


def _amount(data: Input, images: int, pairs: int) -> Amount:
    size = int(data.manifest.shards.size.sum() + data.manifest.shards.table_size.sum())
    return Amount(images, pairs, size * images // max(data.manifest.images, 1))
