"""`lxscale shards …`: build, verify and describe data sets."""

from __future__ import annotations

import argparse
import json
import random
import secrets
from dataclasses import asdict

from cluster.cli import audit
from cluster.cli.answers import add_answers
from cluster.cli.build import add_build, add_formats
from cluster.cli.common import add_cache, out_place, ranges, verdict
from cluster.cli.extract import add_extract
from cluster.cli.inspect import add_dump, add_inspect
from cluster.cli.overlap import add_overlap
from cluster.cli.plan import plan_report
from cluster.cli.progress import shown_progress
from cluster.cli.scenes import add_scenes
from cluster.cli.shards_tools import (
    add_index,
    add_merge,
    add_migrate,
    add_pull,
    add_push,
    add_split,
    add_subset,
)
from cluster.cli.streams import say
from shards.arguments import given_path, given_place, size, whole
from shards.dataset import DatasetSpec, open_dataset
from shards.format.clean import clean, leftovers
from shards.format.info import info
from shards.format.manifest import load_manifest
from shards.format.verify import verify
from shards.sources.easy_vqa import write_easy_vqa
from shards.urls import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="shards_command", required=True)
    for name, add, help_ in (
        ("build", add_build, "make a data set of features, or pictures, and sentences"),
        ("extract", add_extract, "features of pictures, by a detector or for given boxes"),
        ("answers", add_answers, "a joint answer table of several sets"),
        ("formats", add_formats, "the kinds of files that are read"),
        ("verify", _add_verify, "check every byte of a data set"),
        ("info", _add_info, "describe a data set"),
        ("inspect", add_inspect, "what is in a data set, in numbers and as a page to browse"),
        ("dump", add_dump, "show one record"),
        ("merge", add_merge, "one data set of several"),
        ("split", add_split, "several data sets of one, by shares or lists of images"),
        ("subset", add_subset, "a data set of some of another's records"),
        ("overlap", add_overlap, "images that a data set shares with test sets"),
        ("push", add_push, "copy a data set to a store, verified"),
        ("pull", add_pull, "copy a data set, or some of its shards, to a folder, verified"),
        ("index", add_index, "train on tars that others wrote, where they are"),
        ("migrate", add_migrate, "bring a data set of an older layout to the present one"),
        ("clean", _add_clean, "say, or remove, what builds have left at a data set's place"),
        ("plan", _add_plan, "what windows, visits and a cache limit cost"),
        ("audit", audit.add_arguments, "prove what a run has consumed"),
        ("easy-vqa", _add_easy_vqa, "write inputs of `build` from the easy-VQA package"),
        ("scenes", add_scenes, "draw pictures with sentences, as inputs of `build`"),
    ):
        add(commands.add_parser(name, help=help_))


# --- verify, info, plan, easy-vqa ---------------------------------------------------------------


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", type=given_place)
    add("--jobs", type=whole(1), help="processes (default: one a core)")
    part = parser.add_mutually_exclusive_group().add_argument
    part("--shards", type=ranges, metavar="A-B,C", help="only these, by number from 0")
    part("--sample", type=whole(1), metavar="N", help="only so many, drawn at random")
    add("--seed", type=whole(0), help="of --sample's draw (default: another one each time)")
    add(
        "--state",
        type=given_path,
        metavar="FILE",
        help="where to keep what was found whole: a check that was interrupted goes on with it",
    )
    add("--json", action="store_true", help="print a report for scripts")
    parser.set_defaults(func=_verify)


def _verify(args: argparse.Namespace) -> int:
    shards = args.shards
    if args.sample is not None:
        seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
        count = len(load_manifest(args.url).shards)
        shards = random.Random(seed).sample(range(count), min(args.sample, count))
        say(f"checking {len(shards)} of {count} shards, drawn with --seed {seed}")
    with shown_progress() as progress:
        problems = verify(args.url, progress, jobs=args.jobs, shards=shards, state=args.state)
    if args.json:
        print(shown(json.dumps({"url": args.url, "whole": not problems, "problems": problems})))
        return 1 if problems else 0
    for problem in problems:
        print(shown(problem))
    some = None if shards is None else len(set(shards))
    return verdict(args.url, problems, "whole" if some is None else f"{some:,} shards are whole")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", type=given_place)
    parser.add_argument("--json", action="store_true", help="print a report for scripts")
    parser.set_defaults(func=_info)


def _info(args: argparse.Namespace) -> int:
    if args.json:
        m = load_manifest(args.url)
        found = {"url": args.url, "name": m.name, "extractor": m.extractor}
        found |= {"fingerprint": m.fingerprint, "schema": asdict(m.schema), **asdict(m.counts)}
        print(shown(json.dumps(found | {"shards": len(m.shards), "answers": m.answers.count})))
        return 0
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
        print(f"{split}: --features {images} --sentences {sentences} --answers {written.answers}")
    return 0
