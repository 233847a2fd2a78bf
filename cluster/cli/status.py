"""`lxscale status`: how a run stands, from its storage alone; with a cluster, its job, too."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict

from cluster.cli.common import RUN
from shards.arguments import given_place
from shards.urls import shown
from trainer.run_status import RunStatus, run_status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_place, help=RUN)
    parser.add_argument(
        "--ray-address",
        metavar="URL",
        help="of a cluster's dashboard: tell of the run's job there, too",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(func=_status)


def _status(arguments: argparse.Namespace) -> int:
    found = run_status(_absolute(arguments.run), goodput=True)
    job = None
    if arguments.ray_address:
        from cluster.job_server import JobServer  # with Ray, which takes seconds
        from cluster.jobs import jobs_of

        jobs = jobs_of(JobServer(arguments.ray_address), found.url)
        job = jobs[-1] if jobs else None
    if arguments.json:
        told = {k: v for k, v in asdict(job).items() if k != "message"} if job else None
        print(json.dumps({**asdict(found), "job": told}, indent=1))
        return 0
    print(f"{shown(found.url)}: {found.state}")
    saved = f", saved {age(found)} ago ({found.generation})" if found.generation else ""
    print(f"  step      {steps(found)}{saved}")
    if found.attempt:
        print(f"  attempt   {found.attempt}, {found.owner or 'whose claim cannot be read'}")
    if found.goodput is not None:
        print(f"  goodput   {found.goodput:.1%}")
    if found.problem:
        print(f"  problem   {shown(found.problem)}")
    if job:
        print(f"  job       {job.id}: {job.ended}{f' ({job.error})' if job.exit_code else ''}")
    elif arguments.ray_address:
        print(f"  job       none on {arguments.ray_address}")
    return 0


def _absolute(run: str) -> str:
    return run.rstrip("/") if "://" in run else os.path.abspath(run)


def steps(found: RunStatus) -> str:
    return f"{found.step} of {'?' if found.total is None else found.total}"


def age(found: RunStatus) -> str:
    """Of the newest generation: a store's clock may be another one than this machine's."""
    seconds = max(time.time() - (found.saved or 0), 0)
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
