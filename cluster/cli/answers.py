"""`lxscale shards answers`: a joint answer table of several sets."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

from cluster.cli.common import add_sentences, sentence_inputs
from cluster.cli.progress import shown_progress
from cluster.cli.streams import say
from shards.arguments import given_path, whole
from shards.convert.planning import sentence_formats
from shards.format.record import Report, Sentence
from shards.progress import Progress
from shards.sources.answer_table import Coverage, Tally, cover, make_table, write_table


def add_answers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_sentences(parser, required=True)
    add("--out", type=given_path, required=True, metavar="JSON")
    add("--min-count", type=whole(1), default=1,
        help="questions that an answer needs; it counts once for each question in which its score "
        "is above 0 (default: 1)")  # fmt: skip
    add(
        "--size",
        type=whole(1),
        metavar="N",
        help="the most frequent N, those of --base among them; equally frequent ones by name",
    )
    add(
        "--base",
        type=given_path,
        metavar="JSON",
        help="a table whose answers come first, with their ids",
    )
    add("--form", choices=("list", "lxmert"), default="list",
        help="a list, or LXMERT's objects with sets (default: %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print a report for scripts")
    add("--quiet", action="store_true", help="no progress")
    parser.set_defaults(func=_answers)


def _answers(args: argparse.Namespace) -> int:
    report, tally = Report(), Tally()
    coverage: dict[str, Coverage] = {}
    with shown_progress(args.quiet) as progress:
        tally.add(_sentences(args, report, progress, "sentences counted"))
        table = make_table(tally, min_count=args.min_count, size=args.size, base=args.base)
        cover(table, _sentences(args, Report(), progress, "sentences looked up"), coverage)
    write_table(args.out, table, tally, args.form == "lxmert", args.base)
    if args.json:
        sets = {source: asdict(found) for source, found in sorted(coverage.items())}
        told = {"out": str(args.out), "answers": len(table), "sets": sets}
        print(json.dumps(told | {"left_out": report.counts}))
        return 0
    for line in report.lines():
        say(f"left out: {line}")
    print(f"{args.out}: {len(table):,} answers")
    for source, found in sorted(coverage.items()):
        print(
            f"{source:12s} {found.covered:,} of {found.questions:,} questions have an answer in it "
            f"({found.covered / found.questions:.1%}), {found.covered_score / found.score:.1%} of "
            "the scores"
        )
    return 0


def _sentences(
    args: argparse.Namespace, report: Report, progress: Progress, what: str
) -> Iterator[Sentence]:
    count = 0
    for given in sentence_inputs(args):
        for form, files in sentence_formats(given):
            for text in form.read(files, given.source or form.source, report):
                yield from text.sentences
                count += len(text.sentences)
                if count % 1000 < len(text.sentences):
                    progress(what, count, None)
    progress(what, count, count)
