"""`lxscale shards …`: build, verify and describe data sets."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.cli.plan import plan_report
from shards.dataset import DatasetSpec, open_dataset
from shards.format.answers import load_answers
from shards.format.build import BuildSettings, build
from shards.format.record import ImageRecord, Report
from shards.format.verify import info, verify
from shards.sources import images as source_images
from shards.sources import tsv as source_tsv
from shards.sources.easy_vqa import write_easy_vqa


def add_shards_parser(subparsers: Any) -> Any:
    """Add `shards` and its commands; each parser sets `func`, called with the parsed arguments,
    which returns the exit code. DataError is left to the caller to print. Returns the commands'
    subparsers, to which others may be added."""
    shards = subparsers.add_parser("shards", help="build, verify and describe data sets")
    commands = shards.add_subparsers(dest="shards_command", required=True)

    build_parser = commands.add_parser("build", help="convert a source into shards")
    sources = build_parser.add_subparsers(dest="source", required=True)
    tsv = sources.add_parser(
        "tsv", help="bottom-up-attention TSVs and LXMERT's aggregated sentences"
    )
    tsv.add_argument("--features", nargs="+", required=True, type=Path, metavar="TSV")
    tsv.add_argument("--sentences", nargs="+", required=True, type=Path, metavar="JSON")
    _add_build_arguments(tsv, source_tsv.EXTRACTOR)
    tsv.set_defaults(func=_build_tsv)
    images = sources.add_parser("images", help="a folder of pictures and a sentences file")
    images.add_argument("--images", required=True, type=Path, metavar="DIR")
    images.add_argument("--sentences", required=True, type=Path, metavar="JSON")
    images.add_argument(
        "--boxes", type=int, default=36, help=f"boxes a picture: {sorted(source_images.LAYOUTS)}"
    )
    images.add_argument("--source", default="images", help="set of sentences that name none")
    images.add_argument("--workers", type=int, help="processes (default: one per core)")
    _add_build_arguments(images, source_images.EXTRACTOR)
    images.set_defaults(func=_build_images)

    verify_parser = commands.add_parser("verify", help="check every byte of a data set")
    verify_parser.add_argument("url")
    verify_parser.set_defaults(func=_verify)
    info_parser = commands.add_parser("info", help="describe a data set")
    info_parser.add_argument("url")
    info_parser.set_defaults(func=_info)
    planner = commands.add_parser("plan", help="what windows, visits and a cache limit cost")
    planner.add_argument("url", nargs="+")
    planner.add_argument("--window", nargs="+", type=int, default=[1, 4, 16, 0], metavar="SHARDS")
    planner.add_argument(
        "--sentences-per-visit", nargs="+", type=int, default=[1, 2, 4, 8], metavar="K"
    )
    planner.add_argument("--batch", type=int, default=256, help="pairs of a step")
    planner.add_argument("--steps-ahead", type=int, default=8, help="loader workers x prefetch")
    planner.add_argument("--cache-limit-gb", type=float, help="GiB of the node's cache")
    planner.add_argument("--cache", help="folder of the node cache")
    planner.set_defaults(func=_plan)
    easy = commands.add_parser(
        "easy-vqa", help="write the inputs of `build images` from the easy-VQA package"
    )
    easy.add_argument("folder", type=Path)
    easy.set_defaults(func=_easy_vqa)
    return commands


def _add_build_arguments(parser: argparse.ArgumentParser, extractor: str) -> None:
    add = parser.add_argument
    add("--out", required=True, metavar="URL", help="folder or s3:// prefix")
    add("--answers", type=Path, metavar="JSON", help="answer table (default: from the data)")
    add("--min-answer-count", type=int, default=1, help="sentences that an answer needs for it")
    add("--vocab", type=Path, metavar="TXT", help="vocab.txt (default: train one)")
    add("--vocab-size", type=int, default=30522, help="most tokens of a trained one")
    add("--name", help="name of the data set (default: the last part of --out)")
    add("--extractor", default=extractor, help="what made the features (default: %(default)s)")
    add("--feature-dim", type=int, default=2048)
    add("--max-tokens", type=int, default=20, help="with [CLS] and [SEP] (default: %(default)s)")
    add("--shard-mb", type=float, default=128, help="size of a shard (default: %(default)s MiB)")
    add("--images-per-shard", type=int)
    add("--staging", type=Path, metavar="DIR", help="room for a build to object storage")
    add("--skip-bad", action="store_true", help="leave bad records out and report them")
    add("--overwrite", action="store_true", help="replace a data set at --out")
    add("--quiet", action="store_true", help="no progress")


def _build_tsv(args: argparse.Namespace) -> int:
    report = Report()
    records = source_tsv.read_tsv(
        args.features,
        args.sentences,
        expected=source_tsv.Expected(feature_dim=args.feature_dim),
        skip_bad=args.skip_bad,
        report=report,
        progress=_progress("bytes", args.quiet),
    )
    return _build(args, records, report)


def _build_images(args: argparse.Namespace) -> int:
    report = Report()
    records = source_images.read_images(
        args.images,
        args.sentences,
        boxes=args.boxes,
        feature_dim=args.feature_dim,
        source=args.source,
        workers=args.workers,
        skip_bad=args.skip_bad,
        report=report,
        progress=_progress("images", args.quiet),
    )
    return _build(args, records, report)


def _build(args: argparse.Namespace, records: Iterator[ImageRecord], report: Report) -> int:
    out = args.out.rstrip("/")
    settings = BuildSettings(
        name=args.name or out.rpartition("/")[2] or "data",
        extractor=args.extractor,
        vocab=args.vocab,
        vocab_size=args.vocab_size,
        answers=load_answers(args.answers) if args.answers else None,
        min_answer_count=args.min_answer_count,
        shard_bytes=int(args.shard_mb * 2**20),
        images_per_shard=args.images_per_shard,
        max_tokens=args.max_tokens,
        overwrite=args.overwrite,
        skip_bad=args.skip_bad,
    )
    say = _say if not args.quiet else None
    build(records, out, settings, staging=args.staging, report=report, progress=say)
    for line in report.lines():
        _say(f"left out: {line}")
    print(info(out))
    return 0


def _verify(args: argparse.Namespace) -> int:
    problems = verify(args.url, progress=_say)
    for problem in problems:
        print(problem)
    print(f"{args.url}: {f'{len(problems)} problems' if problems else 'whole'}")
    return 1 if problems else 0


def _info(args: argparse.Namespace) -> int:
    print(info(args.url))
    return 0


def _plan(args: argparse.Namespace) -> int:
    data = open_dataset([DatasetSpec(url) for url in args.url], args.cache)
    limit = None if args.cache_limit_gb is None else int(args.cache_limit_gb * 2**30)
    windows = sorted(args.window, key=lambda w: w or len(data.manifest.shards) + 1)
    for line in plan_report(
        data, windows, args.sentences_per_visit, args.batch, args.steps_ahead, limit
    ):
        print(line, flush=True)
    return 0


def _easy_vqa(args: argparse.Namespace) -> int:
    written = write_easy_vqa(args.folder)
    for split, images, sentences in (
        ("train", written.train_images, written.train_sentences),
        ("test", written.test_images, written.test_sentences),
    ):
        print(f"{split}: --images {images} --sentences {sentences} --answers {written.answers}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress(unit: str, quiet: bool) -> Callable[[int, int | None], None] | None:
    """Prints how far a source has come, every five seconds."""
    if quiet:
        return None
    last = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= 5:
            last = time.monotonic()
            share = f" of {total:,} ({100 * done / total:.0f} %)" if total else ""
            _say(f"{done:,}{share} {unit} read")

    return show
