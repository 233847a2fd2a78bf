"""`lxscale shards …`: build, verify and describe data sets."""

from __future__ import annotations

import argparse
import os
import random
import re
import secrets
from functools import partial

from cluster.cli import audit
from cluster.cli.common import add_cache, out_place, verdict
from cluster.cli.plan import plan_report
from cluster.cli.progress import shown_progress
from cluster.cli.streams import say
from shards.arguments import given_path, given_place, size, whole
from shards.dataset import DatasetSpec, open_dataset
from shards.format.answers import load_answers
from shards.format.build import BuildSettings, build
from shards.format.clean import clean, leftovers
from shards.format.info import info
from shards.format.manifest import given_file, load_manifest
from shards.format.pretrained import pretrained_vocab
from shards.format.record import Report
from shards.format.verify import verify
from shards.sources import SOURCES
from shards.sources.easy_vqa import write_easy_vqa
from shards.sources.source import Source
from shards.urls import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="shards_command", required=True)
    for name, add, help_ in (
        ("build", _add_build, "convert a source into shards"),
        ("verify", _add_verify, "check every byte of a data set"),
        ("info", _add_info, "describe a data set"),
        ("clean", _add_clean, "say, or remove, what builds have left at a data set's place"),
        ("plan", _add_plan, "what windows, visits and a cache limit cost"),
        ("audit", audit.add_arguments, "prove what a run has consumed"),
        ("easy-vqa", _add_easy_vqa, "write the inputs of `build images` from the easy-VQA package"),
    ):
        add(commands.add_parser(name, help=help_))


# --- build --------------------------------------------------------------------------------------


def _add_build(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(dest="kind", required=True)
    for name, source in SOURCES.items():
        of_source = sources.add_parser(name, help=source.help)
        source.add_arguments(of_source)
        _add_build_arguments(of_source, source.extractor)
        of_source.set_defaults(func=partial(_build, source))


def _add_build_arguments(parser: argparse.ArgumentParser, extractor: str) -> None:
    add = parser.add_argument
    add("--out", type=out_place, required=True, metavar="URL", help="folder or s3:// prefix")
    add(
        "--answers",
        type=given_path,
        metavar="JSON",
        help="answer table, or a data set that has it (default: from the data)",
    )
    add(
        "--min-answer-count", type=whole(1), default=1, help="sentences that an answer needs for it"
    )
    vocab = parser.add_mutually_exclusive_group().add_argument
    vocab(
        "--vocab",
        type=given_path,
        metavar="TXT",
        help="vocab.txt, or a data set that has it (default: train one)",
    )
    vocab("--tokenizer", metavar="FOLDER", help="or a name: for Hugging Face's AutoTokenizer")
    add("--vocab-size", type=whole(1), default=30522, help="most tokens of a trained one")
    add("--name", help="name of the data set (default: the last part of --out)")
    add("--extractor", default=extractor, help="what made the features (default: %(default)s)")
    add("--feature-dim", type=whole(1, 1 << 20), default=2048)
    add(
        "--max-tokens",
        type=whole(3, 1 << 16),
        default=20,
        help="with [CLS] and [SEP] (default: %(default)s)",
    )
    add(
        "--shard-mb",
        type=size(1 << 20),
        default="128",
        help="size of a shard (default: %(default)s MiB)",
    )
    add("--images-per-shard", type=whole(1), help="a shard ends at so many, too")
    add("--staging", type=given_path, metavar="DIR", help="room for a build to object storage")
    add("--skip-bad", action="store_true", help="leave bad records out and report them")
    add("--overwrite", action="store_true", help="replace a data set at --out")
    add("--quiet", action="store_true", help="no progress")


def _build(source: Source, args: argparse.Namespace) -> int:
    report = Report()
    settings = BuildSettings(
        name=args.name or os.path.basename(os.path.abspath(args.out)),
        extractor=args.extractor,
        vocab=args.vocab if args.tokenizer is None else pretrained_vocab(args.tokenizer),
        vocab_size=args.vocab_size,
        answers=load_answers(given_file(args.answers, "answers")) if args.answers else None,
        min_answer_count=args.min_answer_count,
        shard_bytes=args.shard_mb,
        images_per_shard=args.images_per_shard,
        max_tokens=args.max_tokens,
        overwrite=args.overwrite,
        skip_bad=args.skip_bad,
    )
    try:
        with shown_progress(args.quiet) as progress:
            build(
                source.read(args, report, progress),
                args.out,
                settings,
                staging=args.staging,
                report=report,
                progress=progress,
            )
    finally:  # of a build that fails, too: what was left out may be why
        for line in report.lines():
            say(f"left out: {line}")
    print(info(args.out))
    return 0


# --- verify, info, plan, easy-vqa ---------------------------------------------------------------


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", type=given_place)
    add("--jobs", type=whole(1), help="processes (default: one a core)")
    part = parser.add_mutually_exclusive_group().add_argument
    part("--shards", type=_ranges, metavar="A-B,C", help="only these, by number from 0")
    part("--sample", type=whole(1), metavar="N", help="only so many, drawn at random")
    add("--seed", type=whole(0), help="of --sample's draw (default: another one each time)")
    add(
        "--state",
        type=given_path,
        metavar="FILE",
        help="where to keep what was found whole: a check that was interrupted goes on with it",
    )
    parser.set_defaults(func=_verify)


_MOST = 10**7  # shards of a range, which are listed one by one


def _ranges(text: str) -> list[int]:
    """The type of --shards."""
    out: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())):
            raise argparse.ArgumentTypeError(f"{text!r:.80} is no list as 10-20,25")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= _MOST:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is more shards than there are")
        if last < first:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} ends before it begins")
        out += range(first, last + 1)
    return out


def _verify(args: argparse.Namespace) -> int:
    shards = args.shards
    if args.sample is not None:
        seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
        count = len(load_manifest(args.url).shards)
        shards = random.Random(seed).sample(range(count), min(args.sample, count))
        say(f"checking {len(shards)} of {count} shards, drawn with --seed {seed}")
    with shown_progress() as progress:
        problems = verify(args.url, progress, jobs=args.jobs, shards=shards, state=args.state)
    for problem in problems:
        print(shown(problem))
    some = None if shards is None else len(set(shards))
    return verdict(args.url, problems, "whole" if some is None else f"{some:,} shards are whole")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", type=given_place)
    parser.set_defaults(func=_info)


def _info(args: argparse.Namespace) -> int:
    print(info(args.url))
    return 0


def _add_clean(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", type=out_place)
    add("--remove", action="store_true", help="remove it; builds at work there then fail")
    add(
        "--older",
        type=whole(0),
        default=24,
        metavar="HOURS",
        help="only what was written so long ago (24), and nothing where the data set itself was: a "
        "run may read what it has replaced",
    )
    parser.set_defaults(func=_clean)


def _clean(args: argparse.Namespace) -> int:
    found = leftovers(args.url, args.older)
    for old in found.objects:
        print(f"{old.size:>15,}  {shown(args.url)}/{old.name}")
    if args.remove:
        with shown_progress() as progress:
            clean(args.url, found, progress)
    total = sum(old.size for old in found.objects)
    what = "removed" if args.remove else "nothing refers to"
    print(f"{shown(args.url)}: {what} {len(found.objects):,} objects of {total:,} bytes")
    if found.young:
        print(
            f"{found.young:,} more stay: they, or the data set, are younger than {args.older} hours"
        )
    return 0


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", nargs="+", type=given_place)
    add("--window", nargs="+", type=whole(0), default=[1, 4, 16, 0], metavar="SHARDS")
    add("--lanes", nargs="+", type=whole(1), default=[1, 256], metavar="V")
    add("--sentences-per-visit", nargs="+", type=whole(1), default=[1, 2, 4, 8], metavar="K")
    add("--batch", type=whole(1), default=256, help="pairs of a step")
    add("--steps-ahead", type=whole(0), default=8, help="loader workers x prefetch")
    add("--cache-limit-gb", type=size(1 << 30), help="GiB of the node's cache")
    add_cache(parser)
    parser.set_defaults(func=_plan)


def _plan(args: argparse.Namespace) -> int:
    data = open_dataset([DatasetSpec(url) for url in args.url], args.cache)
    windows = sorted(args.window, key=lambda w: w or len(data.manifest.shards) + 1)
    for line in plan_report(
        data,
        windows,
        args.lanes,
        args.sentences_per_visit,
        args.batch,
        args.steps_ahead,
        args.cache_limit_gb,
    ):
        print(line, flush=True)
    return 0


def _add_easy_vqa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=given_path)
    parser.set_defaults(func=_easy_vqa)


def _easy_vqa(args: argparse.Namespace) -> int:
    written = write_easy_vqa(args.folder)
    for split, images in written.images.items():
        sentences = written.sentences[split]
        print(f"{split}: --images {images} --sentences {sentences} --answers {written.answers}")
    return 0
