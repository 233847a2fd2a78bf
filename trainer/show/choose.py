"""Pairs that are looked at: of images that are drawn, or named by their ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shards.errors import DataError
from shards.format.table import Table
from shards.inspect.find import locate
from shards.inspect.records import OpenSet
from shards.inspect.sample import draw as draw_images
from shards.order.draws import draw, fold
from shards.progress import Progress, no_progress

_NAMED = 5  # ids that an error names


@dataclass(frozen=True)
class Chosen:
    """Pairs of one image."""

    shard: int
    """Number of its shard."""
    index: int
    """Its place in that."""
    sentences: tuple[int, ...]
    """Their numbers among the image's, rising."""


def with_tables(data: OpenSet, chosen: Sequence[Chosen]) -> Iterator[tuple[Table, Chosen]]:
    """What is chosen, with the tables of its shards, of which one is open at a time."""
    table: Table | None = None
    at = -1
    for pairs in chosen:
        if table is None or pairs.shard != at:
            table, at = data.table(pairs.shard), pairs.shard
        yield table, pairs


def draw_pairs(data: OpenSet, images: int, sentences: int, seed: int) -> list[Chosen]:
    """Pairs of so many images (0: of all), of each at most so many (0: all): questions, and where
    these are fewer, other sentences. Images without sentences are left out; DataError where no pair
    is left."""
    chosen = []
    asked = np.isin(data.manifest.sources, data.manifest.question_sources)
    for shard, rows in draw_images(data.manifest, images, seed).rows.items():
        table = data.table(shard)
        for row in rows.tolist():
            first, end = table.image_sentences[row : row + 2].tolist()
            number = np.arange(end - first)
            if 0 < sentences < len(number):
                pair = int(data.manifest.shards.pair_start[shard]) + first
                bits = draw(fold(seed, pair), number)
                question = asked[table.sentence_source[first:end]]
                number = np.sort(np.lexsort((bits, ~question))[:sentences])
            if len(number):
                chosen.append(Chosen(shard, row, tuple(number.tolist())))
    if not chosen:
        raise DataError(f"none of the images of {data.url} that were drawn has a sentence")
    return chosen


def named_pairs(
    data: OpenSet, ids: Sequence[str], progress: Progress = no_progress
) -> list[Chosen]:
    """Pairs by id: `IMAGE#N` is sentence N of an image, from 0, and `IMAGE#` all of its sentences,
    where the image is given by its id, its tar key or its place as 3:17; whatever has no # is a
    question's id, of which the first in the data set is taken.

    For a question's id records are read until all are found. DataError naming what there is not.
    """
    found: dict[tuple[int, int], set[int]] = {}
    questions = []
    for name in ids:
        image, mark, number = name.rpartition("#")
        if not mark:
            questions.append(name)
            continue
        place = locate(data, image, progress)
        count = _sentences(data.table(place[0]), place[1])
        if not count:
            raise DataError(f"image {image!r:.80} of {data.url} has no sentence: name another")
        if number and not (number.isascii() and number.isdigit() and int(number) < count):
            raise DataError(
                f"{name!r:.120} is no pair of {data.url}: sentences of {image!r:.80} are "
                f"{image:.80}#0 to #{count - 1}"
            )
        found.setdefault(place, set()).update([int(number)] if number else range(count))
    for place, sentence in _find_questions(data, questions, progress):
        found.setdefault(place, set()).add(sentence)
    return [Chosen(*place, tuple(sorted(s))) for place, s in found.items()]


def _sentences(table: Table, index: int) -> int:
    first, end = table.image_sentences[index : index + 2].tolist()
    return int(end - first)


def _find_questions(
    data: OpenSet, ids: Sequence[str], progress: Progress
) -> list[tuple[tuple[int, int], int]]:
    """The image and the number of the sentence with each id, in the order of the ids."""
    found: dict[str, tuple[tuple[int, int], int]] = {}
    wanted, shards = set(ids), len(data.manifest.shards)
    for shard in range(shards if wanted else 0):
        table = data.table(shard)
        for index in range(len(table.image_objects)):
            for number, sentence in enumerate(data.record(shard, table, index).sentences):
                if sentence.id is not None and str(sentence.id) in wanted:
                    found.setdefault(str(sentence.id), ((shard, index), number))
        progress("shards searched", shard + 1, shards)
        if len(found) == len(wanted):
            break
    if lost := [name for name in dict.fromkeys(ids) if name not in found]:
        more = f" and {len(lost) - _NAMED:,} others" if len(lost) > _NAMED else ""
        raise DataError(
            f"{data.url} has no question {', '.join(f'{n!r:.60}' for n in lost[:_NAMED])}{more}: "
            "give ids of questions, or IMAGE#N for sentence N of an image (from 0), IMAGE# for all"
        )
    return [found[name] for name in ids]
