"""`lxscale watch`: bring a run to its end, whatever is lost on the way."""

from __future__ import annotations

import argparse
import time

from cluster.cli.common import RUN, add_submission
from cluster.cli.streams import say
from cluster.cli.submit import how
from cluster.watch import watch
from shards.arguments import given_place, whole
from shards.urls import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_place, help=RUN)
    add_submission(parser)
    parser.add_argument(
        "--max-crashes",
        type=whole(0),
        default=5,
        help="new jobs without a new checkpoint after which it gives up (5)",
    )
    parser.set_defaults(func=_watch, take_over=False)


def _watch(arguments: argparse.Namespace) -> int:
    end = watch(arguments.run, arguments.ray_address, how(arguments), arguments.max_crashes, _tell)
    if end.status:
        say(f"error: {end.text}")
    else:
        print(end.text)
    return end.status


def _tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {shown(line)}", flush=True)
