"""The job server of a Ray cluster, over HTTP, and the jobs of runs that it tells of."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray._private.authentication import authentication_token_setup as token
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk
from ray.job_submission import JobDetails, JobSubmissionClient

from cluster.errors import AwayError, LaunchError
from shards.urls import shown

_ADDRESS, _DEFAULT = "RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"
# Seconds for the job server to take a connection, and to answer.
_CONNECT_S, _ANSWER_S = 5.0, 30.0
# Keys of a job's metadata.
_RUN, _NAME = "lxscale_run", "lxscale_name"
_TRIES, _GENERATION = "lxscale_tries", "lxscale_generation"

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Seconds from a stop to SIGKILL: Ray reads it in the job's environment, and takes 3 without."""
# Beyond that, for Ray to say that it has ended.
_SAY_S = 15
_LOOK_S = 0.5

# What they do is told by the commands, and errors by exceptions.
for _module in (dashboard_sdk, sdk):
    _module.logger.setLevel(logging.WARNING)


@dataclass(frozen=True)
class Job:
    """A job of a run, as the job server tells it."""

    id: str
    run: str
    """URL."""
    name: str
    """Of the run."""
    status: str
    """PENDING, RUNNING, STOPPED (by a person), SUCCEEDED or FAILED."""
    exit_code: int | None = None
    """Of the command, negative for a signal; None where it has not ended by itself."""
    message: str = ""
    """Ray's; of a job that failed, with the end of its log."""
    started: int = 0
    """In milliseconds since the epoch, by the head's clock."""
    tries: int = 0
    """How many jobs `watch` had submitted on top of `generation`, this one included; 0 for a
    person's."""
    generation: str = ""
    """The run's newest, when `watch` submitted this."""
    stop_wait: float = 3.0
    """Seconds that it has to end after a stop."""

    @property
    def live(self) -> bool:
        return self.status in ("PENDING", "RUNNING")

    @property
    def ended(self) -> str:
        """How, in words."""
        if self.status != "FAILED":
            return self.status.lower()
        if self.exit_code is None:
            first = self.message.strip().partition("\n")[0]
            return f"failed ({first:.120})"
        by = f"by signal {-self.exit_code}" if self.exit_code < 0 else f"with {self.exit_code}"
        return f"ended {by}"

    @property
    def error(self) -> str:
        """The last line of its log that tells of an error; else how it ended."""
        errors = re.findall(r"^error: (.*)$", self.message, re.MULTILINE)
        return errors[-1] if errors else self.ended


class _Client(JobSubmissionClient):
    """Ray's, whose requests end: its own wait for ever."""

    def _do_request(self, *args: Any, **options: Any) -> requests.Response:
        try:
            return super()._do_request(*args, timeout=(_CONNECT_S, _ANSWER_S), **options)
        except requests.RequestException as error:
            raise _away(self._address, _why(error)) from None


class JobServer:
    """That of one cluster. Every call raises AwayError where it cannot be reached, LaunchError
    where it refuses."""

    def __init__(self, address: str | None = None) -> None:
        """address: of the cluster's dashboard; by default RAY_API_SERVER_ADDRESS's, or the one of
        this machine. Ray's token goes along, from where Ray has it (RAY_AUTH_TOKEN,
        RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)."""
        self.address = _http(address or os.environ.get(_ADDRESS) or _DEFAULT)
        _use_token()
        before = os.environ.get(_ADDRESS)
        os.environ[_ADDRESS] = self.address  # which comes before the argument
        try:
            self._client: _Client = self._ask(lambda: _Client(self.address))
        finally:
            os.environ.pop(_ADDRESS)
            if before is not None:
                os.environ[_ADDRESS] = before

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except LaunchError:
            raise
        except ray.exceptions.AuthenticationError as error:
            raise LaunchError(
                f"Ray at {shown(self.address)} refuses the token: {_first_line(error)}; see "
                "RAY_AUTH_MODE and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)"
            ) from None
        except (requests.RequestException, KeyError, ValueError) as error:
            raise _away(self.address, f"what answers there is no Ray ({_why(error)})") from None
        except RuntimeError as error:
            if "Version check returned 404" in str(error):
                raise _away(self.address, "what answers there is no Ray with jobs") from None
            # Of an answer of 500 and more, the cluster is at fault: its parts may be starting.
            kind = AwayError if re.search(r"status code 5\d\d", str(error)) else LaunchError
            raise kind(f"Ray at {shown(self.address)}: {_last_line(error)}") from None

    def jobs(self) -> list[Job]:
        """Those of runs, oldest first. One request; its answer grows with the cluster's jobs."""
        found = [_job(details) for details in self._ask(self._client.list_jobs)]
        return sorted((job for job in found if job), key=lambda job: job.started)

    def job(self, id_: str) -> Job:
        found = _job(self._ask(lambda: self._client.get_job_info(id_)))
        if found is None:
            raise LaunchError(f"{id_} is no job of a run")
        return found

    def submit(self, id_: str, entrypoint: str, environment: dict[str, str], of: Job) -> None:
        """Submit a job; LaunchError where there is one of that id. of: what its metadata tell."""
        metadata = {_RUN: of.run, _NAME: of.name, _TRIES: str(of.tries), _GENERATION: of.generation}
        self._ask(
            lambda: self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=id_,
                runtime_env={"env_vars": environment},
                metadata=metadata,
            )
        )

    def stop(self, job: Job) -> Job:
        """Ask it to save and end, and wait for that; how it then is."""
        self._ask(lambda: self._client.stop_job(job.id))
        until = time.monotonic() + job.stop_wait + _SAY_S
        while job.live and time.monotonic() < until:
            time.sleep(_LOOK_S)
            job = self.job(job.id)
        return job

    def logs(self, id_: str) -> str:
        text: str = self._ask(lambda: self._client.get_job_logs(id_))
        return text

    def follow(self, id_: str, show: Callable[[str], None]) -> None:
        """Show a job's log from its beginning to its end, as it grows."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(id_):
                show(text)

        try:
            self._ask(lambda: asyncio.run(tail()))
        except aiohttp.ClientError as error:
            raise _away(self.address, str(error)) from None


def _use_token() -> None:
    """Have Ray's client show its token where there is one, as `ray start` does: it makes a head ask
    for it, and its own client would then be refused."""
    found = AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    if found and token.AUTH_MODE_ENV_VAR not in os.environ:
        token._enable_token_auth()


def _http(address: str) -> str:
    """The dashboard's URL; LaunchError for what is none."""
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if not usable or address == "auto":
        raise LaunchError(
            f"{shown(address)!r} is no address of a Ray dashboard: give --ray-address "
            "http://HOST:8265, of the cluster's head"
        )
    return url.rstrip("/")


def _away(address: str, why: str) -> AwayError:
    return AwayError(
        f"cannot reach the job server of Ray at {shown(address)}: {why}; is this its head's "
        "dashboard, and was it started with one (`ray start --head --include-dashboard=true`)?"
    )


def _why(error: BaseException) -> str:
    """The innermost cause, as requests and urllib3 wrap one in the other."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    text = str(error)
    if "BadStatusLine" in text:
        return "another kind of server answers there; give the dashboard's port, 8265 by default"
    inner = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text)
    return inner[1] if inner else f"{text.splitlines()[0] if text else type(error).__name__:.120}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    """Ray answers with a traceback, whose last line says what is wrong."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1].strip() if lines else type(error).__name__


def _job(details: JobDetails) -> Job | None:
    """None for a job of other people's."""
    told = details.metadata or {}
    if not details.submission_id or _RUN not in told:
        return None
    environment = (details.runtime_env or {}).get("env_vars") or {}
    return Job(
        details.submission_id,
        told[_RUN],
        told.get(_NAME, ""),
        getattr(details.status, "value", details.status),
        details.driver_exit_code,
        details.message or "",
        details.start_time or 0,
        int(told.get(_TRIES, 0)),
        told.get(_GENERATION, ""),
        float(environment.get(STOP_WAIT, 3)),
    )
