"""Runs as jobs of a Ray cluster: submitted, and found there by their URLs.

A job is `lxscale train` on the cluster's head. Its configuration travels as overrides on its
command line, so nothing is uploaded, and what a dashboard shows is the command to type. What the
job is to know of the environment goes along; credentials do not, as the job server tells them to
everybody who may ask it, unless that is wished for.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.errors import LaunchError
from cluster.job_server import STOP_WAIT, Job, JobServer
from cluster.launch import absolute_paths
from shards.store.objects import local_path
from shards.urls import shown
from trainer.checkpoint.errors import OwnedError
from trainer.config import RunConfig, parse_config
from trainer.errors import ConfigError
from trainer.run_status import run_config
from trainer.setup import run_url

# Seconds beyond cluster.stop_timeout_s, within which the command ends by itself.
_STOP_MORE_S = 15
# Bytes of one argument of a command, which Linux takes 128 KiB of.
_LONGEST = 120_000

# Of the AWS environment, what is no secret and no place of the machine.
_AWS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
    "AWS_RETRY_MODE",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_USE_DUALSTACK_ENDPOINT",
    "AWS_USE_FIPS_ENDPOINT",
)
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# Names a folder of this machine.
_OWN = ("LXSCALE_CACHE",)


# --- finding --------------------------------------------------------------------------------------


def canonical(run: str) -> str:
    """A run's place as a job's metadata have it: a URL, or an absolute path."""
    path = local_path(run)
    return os.path.abspath(path) if path else run.rstrip("/")


def jobs_of(server: JobServer, run: str) -> list[Job]:
    """The jobs of a run, oldest first. run: its URL, its folder, its name, or the id of one."""
    jobs = server.jobs()
    by_url = [job for job in jobs if job.run == canonical(run)]
    if by_url:
        return by_url
    named = [job for job in jobs if run in (job.id, job.name)]
    if len(urls := sorted({job.run for job in named})) > 1:
        raise LaunchError(f"{run!r} names several runs: give one of {', '.join(urls)}")
    return named


def newest_job(server: JobServer, run: str) -> Job:
    jobs = jobs_of(server, run)
    if not jobs:
        raise LaunchError(
            f"Ray at {shown(server.address)} has no job of a run {run!r}: give its URL, its name, "
            "or a job's id"
        )
    return jobs[-1]


# --- submitting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class How:
    """How jobs are submitted."""

    python: str = "python"
    """The head's, with lxscale."""
    credentials: bool = False
    """They go along, where everybody who may ask the job server sees them."""
    take_over: bool = False


def submit(server: JobServer, config: RunConfig, how: How) -> Job:
    """Submit a run, of a portable configuration. OwnedError where a job of it is there and has not
    ended, unless how.take_over."""
    url = canonical(run_url(config))
    live = [job for job in server.jobs() if job.run == url and job.live]
    if live and not how.take_over:
        raise OwnedError(
            f"the run {url} has a job that is {live[-1].status}, {live[-1].id}: wait for its end, "
            f"or end it with `lxscale stop {url}`, or take the run from it with --take-over"
        )
    id_ = f"{_label(url, config.run.name)}-{secrets.token_hex(4)}"
    return submit_as(server, id_, config, how)


def submit_as(
    server: JobServer, id_: str, config: RunConfig, how: How, tries: int = 0, generation: str = ""
) -> Job:
    """Submit a run as a job of this id, of which there can be one. config: portable."""
    url, name = canonical(run_url(config)), config.run.name
    job = Job(id_, url, name, "PENDING", tries=tries, generation=generation)
    server.submit(id_, entrypoint(config, how), job_environment(config, how.credentials), job)
    return job


def attempt_id(url: str, name: str, attempt: int, jobs: list[Job]) -> str:
    """The id of the job that is to make an attempt, the same for all who see the same jobs."""
    prefix = f"{_label(url, name)}-a{attempt:06d}"
    return f"{prefix}-{1 + sum(job.id.startswith(prefix) for job in jobs)}"


def attempt_of(job: Job) -> int:
    """The attempt that a job of such an id is to make; 0 for a person's."""
    found = re.search(r"-a(\d{6,})-\d+$", job.id)
    return int(found[1]) if found else 0


def _label(url: str, name: str) -> str:
    """Of a run in jobs' ids, which are parts of URLs and of files' names."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80]
    return f"lxscale-{readable}-{hashlib.sha256(url.encode()).hexdigest()[:6]}"


def entrypoint(config: RunConfig, how: How) -> str:
    """The job's command: a configuration without a file, all of whose keys are overrides. It takes
    the place of its shell, so that a stop's signal comes to it once."""
    keys = []
    for name, given in config.given().items():
        keys += _keys(name, given) if isinstance(given, dict) else [f"{name}={_flow(given)}"]
    command = [how.python, "-m", "cluster.cli", "train", os.devnull, "--ray-address", "auto"]
    command += ["--take-over"] * how.take_over
    text = f"exec {shlex.join([*command, *keys])}"
    if len(text.encode()) > _LONGEST:
        raise LaunchError(
            f"the configuration of {config.run.name} takes more than {_LONGEST:,} bytes, and does "
            "not fit on a command line"
        )
    return text


def _keys(section: str, values: dict[str, Any]) -> list[str]:
    return [f"{section}.{key}={_flow(value)}" for key, value in values.items()]


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def job_environment(config: RunConfig, credentials: bool) -> dict[str, str]:
    """What a job, and its workers, get of this environment."""
    names = [n for n in os.environ if n.startswith("LXSCALE_") and n not in _OWN]
    names += [*_AWS, *(_CREDENTIALS if credentials else ())]
    told = {n: os.environ[n] for n in names if n in os.environ}
    secret = [n for n, value in told.items() if shown(value) != value]
    if secret and not credentials:
        raise LaunchError(
            f"{secret[0]} has a password in it, which Ray's job server would show: set it without, "
            "or give --with-credentials"
        )
    return told | {STOP_WAIT: str(math.ceil(config.cluster.stop_timeout_s) + _STOP_MORE_S)}


def config_at(url: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a run's storage, with overrides applied, for a job anywhere. Raises
    NotFoundError where there is no run, ConfigError where the run has been moved."""
    config = portable(run_config(url, overrides))
    moved = canonical(run_url(config)) != canonical(url)
    if moved and not any(text.startswith("run.") for text in overrides):
        raise ConfigError(
            f"{url} has the configuration of {run_url(config)}: where it was moved or copied, "
            "`lxscale resubmit` it with run.storage=… and run.name=… of its place now"
        )
    return config


def portable(config: RunConfig) -> RunConfig:
    """The configuration as another machine takes it: with this one's folders made absolute, as a
    file system that both have may be meant, and TensorBoard's files where they lie by default."""
    given = absolute_paths(config).given()
    # Where a version before this one put it on its own, with the resolved configuration.
    if str(given["run"].get("tensorboard")).endswith(f"/{config.run.name}/tensorboard"):
        del given["run"]["tensorboard"]
    return parse_config(given, "the configuration")
