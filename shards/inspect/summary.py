"""The summary of a data set, and the page that shows it with the records it was made of."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.format.manifest import Manifest
from shards.inspect.counts import TableCounts, count_tables
from shards.inspect.names import load_names
from shards.inspect.page import Page, PageSettings, open_page
from shards.inspect.records import open_set
from shards.inspect.sample import Sampled, SampleTally, draw, read_drawn
from shards.progress import Progress, no_progress


@dataclass(frozen=True)
class Summary:
    """What is in a data set."""

    url: str
    name: str
    extractor: str
    fingerprint: str
    images: int
    """Records."""
    sides: bool
    """Whether these are of two pictures each."""
    pairs: int
    shards: int
    bytes: int
    """Of tars and tables."""
    feature_dim: int
    max_objects: int
    labels: bool
    max_tokens: int
    """With [CLS] and [SEP]."""
    vocab_size: int
    answers: int
    """Entries of the answer table."""
    counted: TableCounts
    """Of everything, exactly."""
    sampled: Sampled
    """Of drawn records."""

    def document(self) -> dict[str, Any]:
        """All of it for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """What is looked at, and how."""

    records: int = 1000
    """That are drawn; 0 for all."""
    seed: int = 0
    objects: Path | None = None
    """Names of object labels, one a line."""
    attributes: Path | None = None
    page: PageSettings | None = None
    """Write a page, too."""


def inspect(
    url: str,
    settings: Settings,
    cache: str | Path | None = None,
    progress: Progress = no_progress,
) -> tuple[Summary, Page | None]:
    """The summary of the data set at `url`, and what became of the page that was asked for.

    Memory: one table, and of the page some thousand records at a time. A remote data set's tables
    and the shards that records are drawn from are then in the node's cache.
    Raises DataError naming what is missing, damaged or cannot be written; the page's file is then
    as it was before.
    """
    data = open_set(url, cache)
    names = load_names(settings.objects, settings.attributes, data.manifest.schema)
    drawn = draw(data.manifest, settings.records, settings.seed)
    with contextlib.ExitStack() as stack:
        page = None
        if settings.page:
            page = stack.enter_context(open_page(settings.page, data.manifest, names))
        counted = count_tables(data, progress)
        tally = SampleTally(data, names)
        for table, record in read_drawn(data, drawn, progress):
            tally.add(table, record)
            if page:
                page.add(record)
        summary = _summary(url, data.manifest, counted, tally.sampled(drawn))
        return summary, page.finish(summary.document()) if page else None


def _summary(url: str, m: Manifest, counted: TableCounts, sampled: Sampled) -> Summary:
    return Summary(
        url=url,
        name=m.name,
        extractor=m.extractor,
        fingerprint=m.fingerprint,
        images=m.images,
        sides=m.schema.sides,
        pairs=m.pairs,
        shards=len(m.shards),
        bytes=int(m.shards.size.sum() + m.shards.table_size.sum()),
        feature_dim=m.schema.feature_dim,
        max_objects=m.schema.max_objects,
        labels=m.schema.labels,
        max_tokens=m.schema.max_tokens,
        vocab_size=m.schema.vocab_size,
        answers=m.answers.count,
        counted=counted,
        sampled=sampled,
    )
