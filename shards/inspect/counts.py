"""What the tables of all shards say, counted exactly; one table is in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.format.manifest import Manifest
from shards.format.table import Table
from shards.inspect.histogram import Histogram, WholeTally
from shards.inspect.records import OpenSet
from shards.progress import Progress

_TOP = 10  # answers that are listed
_COVERAGE = (1, 10, 100, 1000)


@dataclass(frozen=True)
class Answers:
    """The answers of a source's sentences. Of each sentence the one with the highest score counts
    (of equal ones, the one that stands first)."""

    distinct: int
    """Answers of the table that count for some sentence."""
    top: tuple[tuple[str, int], ...]
    """The most frequent ones, and how many sentences each counts for."""
    coverage: dict[int, float]
    """k -> the share of the answered sentences that the k most frequent ones are the answers of."""


@dataclass(frozen=True)
class SourceCounts:
    """The sentences of one source, in the whole data set."""

    source: str
    questions: bool
    sentences: int
    answered: int
    """Sentences with an answer in the table."""
    at_limit: int
    """Sentences with as many tokens as are kept: what was cut is among them."""
    images: int
    """Images with a sentence of it."""
    per_image: Histogram
    """Its sentences of each of these images."""
    tokens: Histogram
    """Of each sentence, without [CLS] and [SEP]."""
    answers: Answers | None
    """None where no sentence has one."""


@dataclass(frozen=True)
class TableCounts:
    """What the tables say of a whole data set."""

    objects: Histogram
    """Of each image."""
    sentences: Histogram
    """Of each image."""
    tokens: Histogram
    """Of each sentence, without [CLS] and [SEP]."""
    answers_used: int
    """Entries of the answer table that a sentence has, as its best answer or another."""
    sources: tuple[SourceCounts, ...]


def count_tables(data: OpenSet, progress: Progress) -> TableCounts:
    """Read the tables of all shards. Memory: a table, and a number for each answer and source that
    has answers.

    Raises DataError naming a table that is missing, damaged or cannot be right.
    """
    manifest = data.manifest
    objects, sentences = WholeTally(), WholeTally()
    used = np.zeros(manifest.answers.count, dtype=bool)
    sources = [_Source(manifest, i) for i in range(len(manifest.sources))]
    shards = len(manifest.shards)
    for number in range(shards):
        table = data.table(number)
        objects.add(table.image_objects)
        sentences.add(np.diff(table.image_sentences))
        used[table.answer_id] = True
        best = _best_answers(table)
        of_image = np.repeat(np.arange(len(table.image_objects)), np.diff(table.image_sentences))
        for source in sources:
            source.add(table, of_image, best)
        progress("tables counted", number + 1, shards)
    tokens = WholeTally()
    for source in sources:
        tokens.add_counts(source.tokens.counts)
    return TableCounts(
        objects=objects.histogram(),
        sentences=sentences.histogram(),
        tokens=tokens.histogram(),
        answers_used=int(used.sum()),
        sources=tuple(source.counts(data) for source in sources),
    )


def _best_answers(table: Table) -> NDArray[np.int64]:
    """The best answer of each sentence, [S]; -1 where it has none."""
    counts = np.diff(table.answer_start)
    out = np.full(len(counts), -1, dtype=np.int64)
    sentence = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-table.answer_score, sentence))  # stable: the first of equal ones stays so
    answered = np.flatnonzero(counts)
    out[answered] = table.answer_id[order[table.answer_start[:-1][answered]]]
    return out


class _Source:
    """Counts of one source, so far."""

    def __init__(self, manifest: Manifest, number: int) -> None:
        self.name = manifest.sources[number]
        self._number, self._manifest = number, manifest
        self._per_image, self.tokens = WholeTally(), WholeTally()
        self._best: NDArray[np.int64] | None = None  # sentences by their best answer

    def add(self, table: Table, of_image: NDArray[np.int64], best: NDArray[np.int64]) -> None:
        mine = np.flatnonzero(table.sentence_source == self._number)
        if not len(mine):
            return
        per_image = np.bincount(of_image[mine])
        self._per_image.add(per_image[per_image > 0])
        self.tokens.add(np.diff(table.token_start)[mine])
        answers = best[mine]
        answers = answers[answers >= 0]
        if len(answers):
            found = np.bincount(answers, minlength=self._manifest.answers.count)
            self._best = found if self._best is None else self._best + found

    def counts(self, data: OpenSet) -> SourceCounts:
        tokens, per_image = self.tokens.histogram(), self._per_image.histogram()
        limit = self._manifest.schema.max_tokens - 2
        at_limit = int(self.tokens.counts[limit:].sum())
        return SourceCounts(
            source=self.name,
            questions=self.name in self._manifest.question_sources,
            sentences=tokens.values,
            answered=0 if self._best is None else int(self._best.sum()),
            at_limit=at_limit,
            images=per_image.values,
            per_image=per_image,
            tokens=tokens,
            answers=None if self._best is None else _answers(self._best, data.answers),
        )


def _answers(best: NDArray[np.int64], names: list[str]) -> Answers:
    order = np.argsort(-best, kind="stable")
    cumulative = np.cumsum(best[order])
    distinct, total = int((best > 0).sum()), int(cumulative[-1])
    return Answers(
        distinct=distinct,
        top=tuple((names[i], int(best[i])) for i in order[: min(_TOP, distinct)].tolist()),
        coverage={k: int(cumulative[min(k, len(best)) - 1]) / total for k in _COVERAGE},
    )
