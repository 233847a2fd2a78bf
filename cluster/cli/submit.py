"""`lxscale submit`: train on a Ray cluster, as a job of it."""

from __future__ import annotations

import argparse

from cluster.cli.common import add_submission, add_take_over
from cluster.cli.streams import say
from cluster.job_server import Job, JobServer
from cluster.jobs import How, portable, submit
from shards.arguments import given_path
from shards.errors import DataError
from shards.store.retry import Retry
from trainer.config import load_config
from trainer.setup import note_run

# Seconds for the run's storage, which need not be in reach from here.
_NOTE_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=given_path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_submission(parser)
    add_take_over(parser)
    parser.set_defaults(func=_submit)


def _submit(arguments: argparse.Namespace) -> int:
    config = portable(load_config(arguments.config, arguments.overrides))
    server = JobServer(arguments.ray_address)
    job = submit(server, config, how(arguments))
    show(server, job)
    try:
        note_run(config, Retry(deadline=_NOTE_S))
    except DataError as error:
        say(f"its storage is not to be had from here, so no `watch` can begin it anew: {error}")
    return 0


def how(arguments: argparse.Namespace) -> How:
    """As the arguments of `add_submission` say."""
    return How(arguments.python, arguments.with_credentials, arguments.take_over)


def show(server: JobServer, job: Job) -> None:
    print(f"submitted {job.id} to {server.address}")
    print(f"lxscale logs -f {job.id} --ray-address {server.address}")
