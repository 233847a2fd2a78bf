"""`lxscale cache …`: what is in a node's cache, whether it is whole, and what can go."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable

from cluster.cli.common import add_cache, verdict
from cluster.cli.progress import shown_progress
from shards import inventory
from shards.arguments import whole
from shards.inventory import KINDS, Item
from shards.store.cache import cache_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="cache_command", required=True)
    for name, add, help_ in (
        ("ls", _add_ls, "list what is there"),
        ("verify", _add_verify, "hash everything again, and set aside what is damaged"),
        ("clean", _add_clean, "remove what nothing uses"),
    ):
        command = commands.add_parser(name, help=help_)
        add_cache(command)
        add(command)


def _add_ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", action="store_true", help="each file, too")
    parser.set_defaults(func=_ls)


def _ls(args: argparse.Namespace) -> int:
    cache = cache_folder(args.cache)
    found = inventory.items(cache)
    if args.files:
        for item in found:
            print(_line(item) + ("  in use" if inventory.in_use(cache, item) else ""))
    print(f"{cache}: {len(found):,} files, {_mib(found)}")
    for kind, what in KINDS.items():
        if of_kind := [item for item in found if item.kind == kind]:
            busy = sum(inventory.in_use(cache, item) for item in of_kind)
            newest = _when(max(item.used for item in of_kind))
            print(
                f"{kind:>10}: {len(of_kind):>7,}  {_mib(of_kind):>14}  {busy:,} in use, used last "
                f"{newest}  ({what})"
            )
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(func=_verify)


def _verify(args: argparse.Namespace) -> int:
    cache = cache_folder(args.cache)
    with shown_progress() as progress:
        problems = inventory.verify(cache, progress)
    for problem in problems:
        print(problem)
    return verdict(str(cache), problems, "whole")


def _add_clean(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--older", type=whole(0), metavar="DAYS", help="what was not used for so long, too")
    add("--all", action="store_true", help="all that no process uses at this time, too")
    add("--dry-run", action="store_true", help="only say what would go")
    parser.set_defaults(func=_clean)


def _clean(args: argparse.Namespace) -> int:
    cache = cache_folder(args.cache)
    chosen = inventory.to_clean(cache, args.older, args.all)
    gone = chosen if args.dry_run else inventory.clean(cache, chosen)
    for item in gone:
        print(_line(item))
    print(f"{cache}: {'would remove' if args.dry_run else 'removed'} {len(gone):,}, {_mib(gone)}")
    return 0


def _line(item: Item) -> str:
    return f"{item.kind:>10}  {_mib([item]):>14}  {_when(item.used)}  {item.path.name}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _mib(found: Iterable[Item]) -> str:
    return f"{sum(item.size for item in found) / 2**20:,.1f} MiB"
