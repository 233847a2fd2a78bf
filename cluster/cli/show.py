"""`lxscale show`: a page of what a checkpoint does with pairs of a data set."""

from __future__ import annotations

import argparse

from cluster.cli.common import CHECKPOINT, add_cache
from cluster.cli.progress import shown_progress
from cluster.cli.streams import say
from shards.arguments import given_name, given_path, given_place, whole
from trainer.show.show import Settings, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=given_place, metavar="RUN", help=CHECKPOINT)
    add("--data", type=given_place, required=True, help="folder or URL of a data set")
    add("--out", type=given_path, required=True, metavar="FILE", help="the page (.html)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--images",
        type=whole(0),
        default=20,
        metavar="N",
        help="images that are drawn; 0 for all (default: 20)",
    )
    which.add_argument(
        "--pairs",
        type=given_name,
        nargs="+",
        default=[],
        metavar="ID",
        help="these pairs instead: ids of questions; IMAGE#N is sentence N of an image (from 0) "
        "and IMAGE# all of its sentences, by its id, tar key or place (3:17)",
    )
    add(
        "--sentences",
        type=whole(0),
        default=5,
        metavar="N",
        help="of each drawn image at most, questions first; 0 for all (default: 5)",
    )
    add("--seed", type=whole(0), default=0, help="of the draw (default: 0)")
    add(
        "--pictures",
        type=given_path,
        metavar="DIR",
        help="the pictures, named as their image ids (default: boxes alone)",
    )
    add("--objects", type=given_path, metavar="FILE", help="names of object labels, one a line")
    add("--attributes", type=given_path, metavar="FILE", help="of attribute labels, likewise")
    add("--quiet", action="store_true", help="no progress")
    add_cache(parser)
    parser.set_defaults(func=_show)


def _show(args: argparse.Namespace) -> int:
    settings = Settings(
        args.out,
        args.images,
        args.sentences,
        tuple(args.pairs),
        args.seed,
        args.pictures,
        args.objects,
        args.attributes,
    )
    with shown_progress(args.quiet) as progress:
        page = show(args.checkpoint, args.data, settings, args.cache, progress)
    each = page.size / page.pairs / 1e3
    print(
        f"{page.path}: {page.pairs:,} pairs of {page.records:,} records, {page.size / 1e6:,.1f} MB "
        f"({each:,.0f} KB a pair)"
    )
    if args.pictures:
        say(f"{page.pictures:,} pictures in it, from {args.pictures}")
    if page.unreadable:
        say(f"{page.unreadable:,} files there are no pictures that can be read")
    return 0
