"""`lxscale shards audit`: the proof of what a run consumed."""

from __future__ import annotations

import argparse

from cluster.cli.common import CHECKPOINT, add_cache, verdict
from cluster.cli.progress import shown_progress
from shards.arguments import given_place
from shards.urls import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_place, help=CHECKPOINT)
    parser.add_argument(
        "--data", nargs="+", type=given_place, metavar="URL", help="where its data sets are now"
    )
    add_cache(parser)
    parser.set_defaults(func=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    from trainer.audit import audit  # with torch, which the other `shards` commands do without

    with shown_progress() as progress:
        found = audit(arguments.run, arguments.data, arguments.cache, progress)
    for line in [*found.lines, *(f"problem: {p}" for p in found.problems)]:
        print(shown(line))
    return verdict(arguments.run, found.problems, "proved")
