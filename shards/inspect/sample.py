"""Records that are drawn from a data set, and what they tell that tables do not."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.format.manifest import Manifest
from shards.format.table import Table
from shards.format.tokenizer import encode_batch, make_tokenizer
from shards.inspect.histogram import Histogram, Tally
from shards.inspect.names import Names
from shards.inspect.records import OpenSet, Record
from shards.progress import Progress

# Shards that records are drawn from, unless it takes more to have enough: each is read whole, as
# its hash has to be checked, and a remote one is fetched.
_SHARDS = 8
_FEATURES = 1000  # records whose features are looked at
_TOP = 20  # labels, splits that are listed
_AREA = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_CONFIDENCE = tuple(i / 10 for i in range(11))
# Zero has a bin of its own; the others are powers of two, as RoI features are anything but evenly
# spread.
_VALUES = (-65536.0, -1.0, -0.0625, -1e-30, 1e-30, *(2.0**i for i in range(-6, 7)), 65536.0)


@dataclass(frozen=True)
class Drawn:
    """Which records are looked at."""

    rows: dict[int, NDArray[np.int64]]
    """Shard -> places in it, rising; shards rise, too."""
    seed: int | None
    """None where all records are looked at."""

    @property
    def records(self) -> int:
        return sum(map(len, self.rows.values()))


def draw(manifest: Manifest, records: int, seed: int) -> Drawn:
    """Draw so many records (0: take all) without regard to order, every one of some shards with
    the same probability: of 8 shards, or of as many as it takes to have enough records."""
    images = manifest.shards.images.tolist()
    if records == 0 or records >= manifest.images:
        return Drawn({i: np.arange(n) for i, n in enumerate(images) if n}, None)
    rng = random.Random(seed)
    order = [i for i in rng.sample(range(len(images)), len(images)) if images[i]]
    shards: list[int] = []
    have = 0
    while order and (len(shards) < _SHARDS or have < records):
        shards.append(order.pop())
        have += images[shards[-1]]
    shards.sort()
    start = np.concatenate([[0], np.cumsum([images[i] for i in shards])])
    flat = np.asarray(sorted(rng.sample(range(have), records)), dtype=np.int64)
    edges = np.searchsorted(flat, start)
    rows = {
        shard: flat[a:b] - first
        for shard, first, a, b in zip(shards, start[:-1], edges[:-1], edges[1:], strict=True)
        if b > a
    }
    return Drawn(rows, seed)


def read_drawn(data: OpenSet, drawn: Drawn, progress: Progress) -> Iterator[tuple[Table, Record]]:
    """The drawn records in order, each with its shard's table; evenly spread over them, at most
    1,000 come with their features. DataError naming what is damaged."""
    total, done = drawn.records, 0
    every = -(-total // _FEATURES)
    progress("records read", 0, total)
    for shard, rows in drawn.rows.items():
        table = data.table(shard)
        for row in rows.tolist():
            yield table, data.record(shard, table, row, features=done % every == 0)
            done += 1
            progress("records read", done, total)


@dataclass(frozen=True)
class Features:
    """Values of RoI features."""

    records: int
    """Whose features were looked at."""
    zeros: float
    """Share of values that are 0."""
    negative: float
    """Share of values below 0."""
    values: Histogram
    """Bin edges are powers of two; 0 has a bin of its own."""


@dataclass(frozen=True)
class LabelCounts:
    """Labels of one kind."""

    distinct: int
    top: tuple[tuple[int, str, int, float], ...]
    """Id, name (or the id again), objects that have it, their mean confidence; most first."""
    confidence: Histogram


@dataclass(frozen=True)
class Sampled:
    """What the drawn records say."""

    records: int
    shards: int
    """That they are from."""
    seed: int | None
    """None where these are all records."""
    sentences: int
    cut: float
    """Share of the sentences that are longer than what is kept of them."""
    answered_in_source: int
    """Sentences that came with answers."""
    answered_in_table: int
    """Of these, those with one in the answer table."""
    splits: tuple[tuple[str, int], ...]
    """Split and images; the empty name is of those without one."""
    width: tuple[int, int]
    """Least and most, in pixels."""
    height: tuple[int, int]
    boxes: int
    box_area: Histogram
    """Of each object, over the picture's."""
    objects: LabelCounts | None
    """None without labels."""
    attributes: LabelCounts | None
    features: Features


class SampleTally:
    """Counts over records, one by one; memory grows with distinct labels and splits alone."""

    def __init__(self, data: OpenSet, names: Names) -> None:
        schema = data.manifest.schema
        self._limit = schema.max_tokens - 2
        self._tokenizer = make_tokenizer(data.tokens)
        self._records = self._sentences = self._cut = self._boxes = 0
        self._in_source = self._in_table = 0
        self._splits: Counter[str] = Counter()
        self._sizes: tuple[int, int, int, int] | None = None
        self._area = Tally(_AREA)
        self._objects = _LabelTally(names.objects) if schema.labels else None
        self._attributes = _LabelTally(names.attributes) if schema.labels else None
        self._values = Tally(_VALUES)
        self._with_features = self._zeros = self._negative = 0

    def add(self, table: Table, record: Record) -> None:
        self._records += 1
        self._splits[record.split or ""] += 1
        for picture in (part.picture for part in record.parts):
            w, h = picture.width, picture.height
            a, b, c, d = self._sizes or (w, w, h, h)
            self._sizes = min(a, w), max(b, w), min(c, h), max(d, h)
        self._boxes += len(record.boxes)
        self._area.add(np.prod(record.boxes[:, 2:] - record.boxes[:, :2], axis=1))
        self._add_sentences(table, record)
        if (labels := record.labels) and self._objects and self._attributes:
            self._objects.add(labels.object_id, labels.object_conf)
            self._attributes.add(labels.attribute_id, labels.attribute_conf)
        if record.features is not None:
            self._with_features += 1
            self._zeros += int((record.features == 0).sum())
            self._negative += int((record.features < 0).sum())
            self._values.add(record.features)

    def _add_sentences(self, table: Table, record: Record) -> None:
        first, end = table.image_sentences[record.index : record.index + 2].tolist()
        self._sentences += end - first
        # Only what fills all places can have been cut.
        full = np.flatnonzero(np.diff(table.token_start[first : end + 1]) == self._limit).tolist()
        texts = [record.sentences[i].text for i in full]
        if texts:
            whole = encode_batch(self._tokenizer, texts, self._limit + 1)
            self._cut += sum(len(ids) > self._limit for ids in whole)
        for i, kept in enumerate(np.diff(table.answer_start[first : end + 1]).tolist()):
            if record.sentences[i].answers:
                self._in_source += 1
                self._in_table += kept > 0

    def sampled(self, drawn: Drawn) -> Sampled:
        values = self._values.histogram()
        count = max(values.values, 1)
        a, b, c, d = self._sizes or (0, 0, 0, 0)
        return Sampled(
            records=self._records,
            shards=len(drawn.rows),
            seed=drawn.seed,
            sentences=self._sentences,
            cut=self._cut / max(self._sentences, 1),
            answered_in_source=self._in_source,
            answered_in_table=self._in_table,
            splits=tuple(self._splits.most_common(_TOP)),
            width=(a, b),
            height=(c, d),
            boxes=self._boxes,
            box_area=self._area.histogram(),
            objects=self._objects.counts() if self._objects else None,
            attributes=self._attributes.counts() if self._attributes else None,
            features=Features(
                self._with_features, self._zeros / count, self._negative / count, values
            ),
        )


class _LabelTally:
    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._counts: Counter[int] = Counter()
        self._sums: Counter[int] = Counter()  # of confidences
        self._confidence = Tally(_CONFIDENCE)

    def add(self, ids: NDArray[np.int32], confidences: NDArray[np.float32]) -> None:
        self._confidence.add(confidences)
        for i, confidence in zip(ids.tolist(), confidences.tolist(), strict=True):
            self._counts[i] += 1
            self._sums[i] += confidence

    def counts(self) -> LabelCounts:
        most = sorted(self._counts.items(), key=lambda e: (-e[1], e[0]))[:_TOP]
        named = Names(self._names)
        return LabelCounts(
            distinct=len(self._counts),
            top=tuple((i, named.object(i), n, self._sums[i] / n) for i, n in most),
            confidence=self._confidence.histogram(),
        )
