"""`lxscale logs`: what a run's job says."""

from __future__ import annotations

import argparse
import sys

from cluster.cli.common import add_job_server
from cluster.cli.streams import say
from cluster.job_server import JobServer
from cluster.jobs import newest_job
from shards.arguments import given_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_name, help="a run's URL or name, or a job's id")
    parser.add_argument("-f", "--follow", action="store_true", help="as it grows, to its end")
    add_job_server(parser)
    parser.set_defaults(func=_logs)


def _logs(arguments: argparse.Namespace) -> int:
    server = JobServer(arguments.ray_address)
    job = newest_job(server, arguments.run)
    if not arguments.follow:
        _show(server.logs(job.id))
        return 0
    server.follow(job.id, _show)
    job = server.job(job.id)
    say(f"job {job.id} {job.ended}")
    if job.status == "SUCCEEDED":
        return 0
    return job.exit_code if job.exit_code and job.exit_code > 0 else 75


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
