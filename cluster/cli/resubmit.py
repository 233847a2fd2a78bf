"""`lxscale resubmit`: go on with a run, from its storage alone."""

from __future__ import annotations

import argparse

from cluster.cli.common import RUN, add_submission, add_take_over
from cluster.cli.submit import how, show
from cluster.job_server import JobServer
from cluster.jobs import canonical, config_at, submit
from shards.arguments import given_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_place, help=RUN)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_submission(parser)
    add_take_over(parser)
    parser.set_defaults(func=_resubmit)


def _resubmit(arguments: argparse.Namespace) -> int:
    config = config_at(canonical(arguments.run), arguments.overrides)
    server = JobServer(arguments.ray_address)
    show(server, submit(server, config, how(arguments)))
    return 0
