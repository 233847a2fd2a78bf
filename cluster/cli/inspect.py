"""`lxscale shards inspect` and `lxscale shards dump`: looking at a data set."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from cluster.cli.common import add_cache
from cluster.cli.progress import shown_progress
from cluster.cli.streams import say
from shards.arguments import given_path, given_place, whole
from shards.format.info import info
from shards.inspect.find import show
from shards.inspect.page import Page, PageSettings
from shards.inspect.summary import Settings, inspect
from shards.inspect.text import record_lines, summary_lines


def add_inspect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", type=given_place)
    add(
        "--records",
        type=whole(0),
        default=1000,
        metavar="N",
        help="records that are read from the tars, for the page, too; 0 for all (default: 1000)",
    )
    add("--seed", type=whole(0), default=0, help="of their draw (default: 0)")
    add("--html", type=given_path, metavar="FILE", help="write a page to browse and search them")
    add(
        "--images",
        type=given_path,
        metavar="DIR",
        help="the pictures, named as their image ids, for the page (default: boxes alone)",
    )
    add(
        "--pictures",
        type=whole(1),
        default=300,
        metavar="N",
        help="pictures in the page at most, those of the first records (default: 300)",
    )
    _add_names(parser)
    parser.set_defaults(func=_inspect)


def add_dump(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", type=given_place)
    parser.add_argument(
        "key", metavar="KEY", help="an image id, a key in a tar, or shard:index (3:17, from 0)"
    )
    _add_names(parser)
    parser.set_defaults(func=_dump)


def _add_names(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--objects", type=given_path, metavar="FILE", help="names of object labels, one a line")
    add("--attributes", type=given_path, metavar="FILE", help="of attribute labels, likewise")
    add("--json", action="store_true", help="print JSON")
    add("--quiet", action="store_true", help="no progress")
    add_cache(parser)


def _inspect(args: argparse.Namespace) -> int:
    page = PageSettings(args.html, args.images, args.pictures) if args.html else None
    settings = Settings(args.records, args.seed, args.objects, args.attributes, page)
    with shown_progress(args.quiet) as progress:
        summary, written = inspect(args.url, settings, args.cache, progress)
    if args.json:
        print(json.dumps(summary.document()))
    else:
        _print([*info(args.url).split("\n"), "", *summary_lines(summary)])
    if written:
        _say_page(written, args.images)
    return 0


def _say_page(page: Page, images: Path | None) -> None:
    say(f"{page.path}: {page.records:,} records, {page.size / 1e6:,.1f} MB")
    if images:
        say(f"{page.pictures:,} pictures in it, from {images}")
    if page.unreadable:
        say(f"{page.unreadable:,} files there are no pictures that can be read")


def _dump(args: argparse.Namespace) -> int:
    with shown_progress(args.quiet) as progress:
        found = show(args.url, args.key, args.objects, args.attributes, args.cache, progress)
    if args.json:
        print(json.dumps(found.document()))
    else:
        _print(record_lines(found))
    return 0


def _print(lines: Iterable[str]) -> None:
    """Lines on stdout; a terminal of another encoding has `?` for what it cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, "replace").decode(encoding))
