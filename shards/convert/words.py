"""The words of a build: vocabulary, answers and sets, made from its sentences or given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.convert.append import Existing
from shards.convert.plan import Plan, source_counts
from shards.errors import DataError
from shards.format.answers import answer_index, count_answers, normalise_answers
from shards.format.build import BuildSettings
from shards.format.manifest import given_file
from shards.format.record import QA_SOURCES, Report
from shards.format.tokenizer import load_vocab, train_vocab
from shards.progress import Progress


@dataclass(frozen=True)
class Words:
    """What the sentences are turned into numbers with."""

    tokens: list[str]
    answers: list[str]
    sources: list[str]
    question_sources: frozenset[str]


def make_words(
    plan: Plan,
    settings: BuildSettings,
    base: Existing | None,
    report: Report,
    progress: Progress,
) -> Words:
    """Given words, those of the data set that is added to, or words made from the plan's sentences.
    DataError where a given table lacks an answer, or a data set one of the sets."""
    every, answered = source_counts(plan)
    if base:
        if new := sorted(set(every) - set(base.manifest.sources)):
            raise DataError(
                f"the data set has no sentences of {new[0]!r:.80}, which cannot be added to it: "
                "build a data set of them, and name both in data.train"
            )
        questions = frozenset(base.manifest.question_sources)
        _check_answers(plan, base.answers, settings, report)
        return Words(base.tokens, base.answers, list(base.manifest.sources), questions)
    if len(every) > 256:
        raise DataError(f"there are {len(every)} sources of sentences: 256 is the limit")
    if settings.answers is not None:
        answers = list(settings.answers)
        _check_answers(plan, answers, settings, report)
    else:
        found = (s.answers for s in plan.sentences() if s.answers is not None)
        answers = count_answers(found, settings.min_answer_count)
        known = answer_index(answers)
        _count_unknown(plan, known, report)
    if settings.vocab is None:
        progress("vocabulary trained", 0, 1)
        tokens = train_vocab((s.text for s in plan.sentences()), settings.vocab_size)
        progress("vocabulary trained", 1, 1)
    elif isinstance(settings.vocab, Path):
        tokens = load_vocab(given_file(settings.vocab, "vocab"))
    else:
        tokens = list(settings.vocab)
    questions = QA_SOURCES | {s for s in every if answered[s]}
    return Words(tokens, answers, sorted(every), frozenset(questions))


def _check_answers(
    plan: Plan, answers: Sequence[str], settings: BuildSettings, report: Report
) -> None:
    """A table that the user gave should have every answer; one made from the data need not."""
    known = answer_index(answers)
    if settings.skip_bad:
        _count_unknown(plan, known, report)
        return
    for sentence in plan.sentences():
        for answer in normalise_answers(sentence.answers or {}):
            if answer not in known:
                raise DataError(
                    f"{sentence.source}, {sentence.text!r:.60}: the answer {answer!r:.40} is not "
                    "in the answer table: add it there, or --skip-bad leaves such answers out and "
                    "counts them"
                )


def _count_unknown(plan: Plan, known: dict[str, int], report: Report) -> None:
    for sentence in plan.sentences():
        for answer in normalise_answers(sentence.answers or {}):
            if answer not in known:
                report.add("answers that are not in the answer table", answer)
