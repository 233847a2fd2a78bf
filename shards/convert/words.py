"""The words of a build: vocabulary, answers and sets, made from its sentences or given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.convert.append import Existing
from shards.convert.plan import Census, Plan, take_census
from shards.errors import DataError
from shards.format.answers import answer_index, answer_table, normalise_answers
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
    census = take_census(plan)
    if base:
        if new := sorted(set(census.sentences) - set(base.manifest.sources)):
            raise DataError(
                f"the data set has no sentences of {new[0]!r:.80}, which cannot be added to it: "
                "build a data set of them, and name both in data.train"
            )
        _check_answers(plan, census, base.answers, settings.skip_bad, report)
        questions = frozenset(base.manifest.question_sources)
        return Words(base.tokens, base.answers, list(base.manifest.sources), questions)
    if len(census.sentences) > 256:
        raise DataError(f"there are {len(census.sentences)} sources of sentences: 256 is the limit")
    if settings.answers is not None:
        answers = list(settings.answers)
        _check_answers(plan, census, answers, settings.skip_bad, report)
    else:  # a table that is made of the data need not have all
        answers = answer_table(census.answers, settings.min_answer_count)
        _check_answers(plan, census, answers, True, report)
    if settings.vocab is None:
        progress("vocabulary trained", 0, 1)
        tokens = train_vocab((s.text for s in plan.sentences()), settings.vocab_size)
        progress("vocabulary trained", 1, 1)
    elif isinstance(settings.vocab, Path):
        tokens = load_vocab(given_file(settings.vocab, "vocab"))
    else:
        tokens = list(settings.vocab)
    questions = QA_SOURCES | {s for s, n in census.answered.items() if n}
    return Words(tokens, answers, sorted(census.sentences), frozenset(questions))


def _check_answers(
    plan: Plan, census: Census, answers: Sequence[str], leave_out: bool, report: Report
) -> None:
    """DataError for an answer that a table lacks, or the report has all such."""
    known = answer_index(answers)
    unknown = {answer: n for answer, n in census.answers.items() if answer not in known}
    if leave_out:
        for answer, count in unknown.items():
            report.add("answers that are not in the answer table", answer, count)
        return
    if not unknown:
        return
    for sentence in plan.sentences():
        for answer in normalise_answers(sentence.answers or {}):
            if answer in unknown:
                raise DataError(
                    f"{sentence.source}, {sentence.text!r:.60}: the answer {answer!r:.40} is not "
                    "in the answer table: add it there, or --skip-bad leaves such answers out and "
                    "counts them"
                )
