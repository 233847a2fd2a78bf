"""The plan of a build: every image that it takes, with its sentences, dealt to parts.

It is a temporary SQLite file (planning.py fills it), so that memory does not grow with the data.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shards.format.answers import normalise_answers
from shards.format.record import Sentence
from shards.sources.regions import Entry, FeatureFormat, Options


@dataclass(frozen=True)
class FeatureFile:
    """A file of features: what a reader of it needs."""

    url: str
    format: FeatureFormat
    options: Options


@dataclass(frozen=True)
class PlannedImage:
    """An image of the plan, with all its sentences."""

    file: int
    """Index into `Plan.files`."""
    entry: Entry
    sentences: tuple[Sentence, ...]
    split: str | None
    second: tuple[int, Entry] | None = None
    """Of a record of two images the second one, with its file; the sentences are about both."""
    name: str = ""
    """What both are called."""

    @property
    def files(self) -> tuple[int, ...]:
        return (self.file, self.second[0]) if self.second else (self.file,)


class Plan:
    """What the inputs hold. Open while its SQLite file is needed."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self.files: list[FeatureFile] = []
        self.parts = 0
        self.digest = ""
        """sha256 (hex) of all that the bytes of the shards follow from."""

    # --- what is asked of it --------------------------------------------------------------------

    @property
    def images(self) -> int:
        return int(self.one("select count(*) from image where part is not null"))

    def part(self, number: int) -> list[PlannedImage]:
        """The images of a part, in order."""
        return list(self._images("where part = ?", (number,)))

    def part_sizes(self) -> list[int]:
        """Images of each part."""
        rows = self._database.execute(
            "select count(*) from image where part is not null group by part order by part"
        )
        return [n for (n,) in rows]

    def first(self) -> Iterator[PlannedImage]:
        """The images from the first one on."""
        return self._images("where part is not null")

    def bytes(self) -> int:
        """About what the records take."""
        return int(self.one("select sum(bytes) from image where part is not null") or 0)

    def sentences(self) -> Iterator[Sentence]:
        """All sentences of images that are taken."""
        rows = self._database.execute(
            "select text.body from image join text on text.image = image.id "
            "where image.part is not null order by image.number, text.rowid"
        )
        for (body,) in rows:
            yield from _parsed(body)

    def one(self, query: str, values: Sequence[Any] = ()) -> Any:
        """The first column of the first row that a query finds; None where it finds none."""
        row = self._database.execute(query, values).fetchone()
        return row[0] if row else None

    def _images(self, where: str, values: Sequence[Any] = ()) -> Iterator[PlannedImage]:
        rows = self._database.execute(
            f"select name, id, file, position, place, objects, split, second from image {where} "
            "order by number",
            values,
        )
        for name, image, file, position, place, count, split, second in rows:
            texts = self._database.execute(
                "select body, split from text where image = ? order by rowid", (image,)
            ).fetchall()
            found = tuple(s for body, _ in texts for s in _parsed(body))
            split = next((s for _, s in texts if s is not None), split)
            entry = Entry(name, position, place, count)
            if second is None:
                yield PlannedImage(file, entry, found, split)
                continue
            (first, *_), (other, *rest) = json.loads(second)
            entry, two = replace(entry, image=first), (rest[0], Entry(other, *rest[1:4]))
            yield PlannedImage(file, entry, found, split, two, name)


def _parsed(body: str) -> tuple[Sentence, ...]:
    return tuple(Sentence(*row) for row in json.loads(body))


@dataclass
class Census:
    """How many sentences of images that are taken there are, by set and by answer."""

    sentences: Counter[str]
    answered: Counter[str]
    """Those with answers, by set."""
    answers: Counter[str]
    """By normal form."""


def take_census(plan: Plan) -> Census:
    """Count the sentences of a plan, in one pass."""
    census = Census(Counter(), Counter(), Counter())
    for sentence in plan.sentences():
        census.sentences[sentence.source] += 1
        if sentence.answers:
            census.answered[sentence.source] += 1
            for answer in normalise_answers(sentence.answers):
                census.answers[answer] += 1
    return census
