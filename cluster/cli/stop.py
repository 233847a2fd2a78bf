"""`lxscale stop`: have a run's job save and end."""

from __future__ import annotations

import argparse

from cluster.cli.common import add_job_server
from cluster.errors import AgainError
from cluster.job_server import JobServer
from cluster.jobs import jobs_of, newest_job
from shards.arguments import given_name
from trainer.run_status import run_status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_name, help="a run's URL or name, or a job's id")
    add_job_server(parser)
    parser.set_defaults(func=_stop)


def _stop(arguments: argparse.Namespace) -> int:
    server = JobServer(arguments.ray_address)
    job = newest_job(server, arguments.run)
    live = [job for job in jobs_of(server, arguments.run) if job.live]
    if not live:
        print(f"no job of it is running; the last one, {job.id}, {job.ended}")
        return 0
    for job in live:
        print(f"stopping {job.id}: the workers save a checkpoint", flush=True)
        job = server.stop(job)
        if job.live:
            raise AgainError(f"{job.id} was asked to stop and is still {job.status}")
        print(f"{job.id} {job.ended}")
    found = run_status(job.run)
    print(f"step {found.step} is saved in {found.url}; `lxscale resubmit` goes on")
    return 0
