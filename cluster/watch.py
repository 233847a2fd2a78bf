"""A run brought to its end, however often its jobs, its nodes or its cluster's head are lost.

    observe   what the run's storage and the cluster's job list say
    decide    what follows: a pure function of that
    watch     does it, again and again

A watch keeps nothing: all that it goes by is in these two places, so it may be ended and started
again at any time, and any number of them may watch a run. A job's id is a function of what was
seen, and a cluster takes an id once; of jobs on several clusters the run's owner is one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.errors import AwayError, LaunchError
from cluster.job_server import Job, JobServer
from cluster.jobs import How, attempt_id, attempt_of, canonical, config_at, jobs_of, submit_as
from shards.errors import NotFoundError, StoreError
from trainer.run_status import RunStatus, run_status

# Seconds between two looks, and the longest where nothing answers.
_LOOK_S, _AWAY_S = 5.0, 60.0
# Seconds before the first new job on top of a generation, doubled with each one, and the longest.
_FIRST_S, _LONGEST_S = 2.0, 300.0
# What a command of a job ends with that another one would end with, too: a user's error, and a
# shell that finds no such command.
_FINAL = (2, 126, 127)
# What one ends with that had no room, or no store, and is to be run again.
_AGAIN = 75


@dataclass(frozen=True)
class Facts:
    """What is known of a run."""

    jobs: tuple[Job, ...] | None
    """Those of the run, oldest first; None where the cluster does not answer."""
    run: RunStatus | None = None
    """None where there is no such run, where the store does not answer, and where a job is live, as
    that says enough."""
    away: str = ""
    """What did not answer, and why."""
    missing: bool = False
    """The store answers, and has no such run."""


@dataclass(frozen=True)
class Decision:
    do: Literal["wait", "submit", "end"]
    text: str
    status: int = 0
    """To end with."""
    tries: int = 0
    """Of the job to submit: the how manieth on top of the run's newest generation, without those
    for which there was no room."""
    jobs: int = 0
    """All of them."""


def decide(facts: Facts, max_crashes: int) -> Decision:
    """What follows from the facts. max_crashes: jobs on top of one generation that may end without
    another one."""
    run, jobs = facts.run, facts.jobs
    live = [job for job in jobs or () if job.live]
    if live:
        return Decision("wait", f"job {live[-1].id} is {live[-1].status}")
    if run and run.state == "running":
        return Decision("wait", f"attempt {run.attempt} is under way ({run.owner})")
    if run and run.state == "done":
        return Decision("end", f"done: step {run.step}, saved in {run.url}")
    if facts.missing and not jobs:
        return Decision("end", "there is no such run: begin it with `lxscale submit`", status=2)
    if jobs is None or (run is None and not facts.missing):
        return Decision("wait", facts.away)
    last = jobs[-1] if jobs else None
    if last and last.status == "STOPPED":
        at = f" at step {run.step}" if run else ""
        text = f"job {last.id} was stopped by a person{at}; `lxscale resubmit` goes on"
        return Decision("end", text, status=3)
    if last and last.status == "FAILED" and last.exit_code in _FINAL:
        return Decision("end", f"job {last.id}: {last.error}", status=2)
    if run is None:
        assert last
        text = f"job {last.id} {last.ended}, and the store has no such run: submit it again"
        return Decision("end", text, status=2)
    if last and last.status == "SUCCEEDED" and run.total is None:
        return Decision("end", f"done: step {run.step}, saved in {run.url}")
    on_top = [job for job in jobs if job.generation == run.generation]
    tries = 1
    if last and last in on_top:
        # One that never began an attempt, as there was no room or no store, has not crashed.
        begun = last.exit_code != _AGAIN or attempt_of(last) <= run.attempt
        tries = last.tries + begun
    how = (
        f"job {last.id} {last.ended}" if last else f"the run is {run.state}, and no job of it here"
    )
    if tries > max_crashes:
        text = (
            f"{max_crashes} jobs in a row have ended without a checkpoint after step {run.step} "
            f"({how}: {last.error if last else ''}): see `lxscale logs {run.url}`"
        )
        return Decision("end", text, status=1)
    text = f"{how}; it goes on from step {run.step}"
    return Decision("submit", text, tries=tries, jobs=len(on_top) + 1)


def pause(number: int) -> float:
    """Seconds to wait before a job is submitted for the so manieth time on top of a generation."""
    return min(_LONGEST_S, _FIRST_S * 2 ** min(number - 1, 20)) * random.uniform(0.5, 1)


# --- doing it -------------------------------------------------------------------------------------


def watch(
    url: str, address: str | None, how: How, max_crashes: int, tell: Callable[[str], None]
) -> Decision:
    """Look after the run at `url` until nothing is left to do; the decision to end. tell: is told a
    line where something has changed.

    Raises LaunchError where the address is none, DataError, CheckpointError or ConfigError where
    the run's storage cannot be read for a reason that does not pass.
    """
    url = canonical(url)
    known, said, silent = "", "", 0
    due: tuple[Decision, float] | None = None
    while True:
        server, facts = observe(url, address, known)
        decision = decide(facts, max_crashes)
        if decision.text != said and decision.do != "end":
            tell(said := decision.text)
        known = next((job.id for job in reversed(facts.jobs or ()) if job.live), "")
        silent = silent + 1 if facts.away else 0
        if decision.do == "end":
            return decision
        if decision.do == "wait" or server is None:
            due = None
            time.sleep(min(_AWAY_S, _LOOK_S * 2 ** min(silent, 10)) * random.uniform(0.5, 1))
        elif due is None or due[0] != decision:
            due = decision, time.monotonic() + pause(decision.jobs)
        elif (left := due[1] - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_S))
        else:
            due = None
            _submit(server, url, facts, how, decision.tries, tell)


def observe(url: str, address: str | None, known: str) -> tuple[JobServer | None, Facts]:
    """What is known of the run now. known: id of a job that was live: as long as it is, one small
    question is enough."""
    server, jobs, away = None, None, ""
    try:
        server = JobServer(address)
        if known:
            job = _asked(server, known)
            if job and job.live:
                return server, Facts((job,))
        jobs = tuple(jobs_of(server, url))
    except AwayError as error:
        away = str(error)
    if any(job.live for job in jobs or ()):
        return server, Facts(jobs)
    try:
        return server, Facts(jobs, run_status(url), away)
    except NotFoundError:
        return server, Facts(jobs, None, away, missing=True)
    except StoreError as error:
        return server, Facts(jobs, None, str(error))


def _asked(server: JobServer, id_: str) -> Job | None:
    """A job; None where the cluster does not know it, as another one is at the address now."""
    try:
        return server.job(id_)
    except AwayError:
        raise
    except LaunchError:
        return None


def _submit(
    server: JobServer,
    url: str,
    facts: Facts,
    how: How,
    tries: int,
    tell: Callable[[str], None],
) -> None:
    """Submit the run's next job. Where that cannot be, the next look says what follows: another
    watch may have been first."""
    assert facts.run
    config = config_at(url)
    id_ = attempt_id(url, config.run.name, facts.run.attempt + 1, list(facts.jobs or ()))
    try:
        job = submit_as(server, id_, config, how, tries, facts.run.generation)
    except LaunchError as error:
        tell(f"job {id_} was not submitted: {error}")
        return
    tell(f"submitted {job.id}, number {tries} after step {facts.run.step}")
