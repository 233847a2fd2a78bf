"""Training and measuring the runs of a table (comparison.py), some at a time.

Each run and each evaluation is a process of its own. What is measured is kept beside the runs, so
that the same command goes on where it was cut; a run that is cut goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from cluster.comparison import (
    Cell,
    Comparison,
    Trained,
    cell_name,
    configuration,
    overrides,
    run_name,
)
from cluster.errors import LaunchError
from shards.errors import DataError
from shards.format.manifest import load_manifest
from shards.store import objects
from trainer.errors import ConfigError
from trainer.run_status import run_status
from trainer.setup import run_url

RESULTS = "comparison.json"
"""What is measured, in the table's storage: run -> metrics."""
_LINES = 20  # of a process's output that an error shows


@dataclass(frozen=True)
class Job:
    """A run of the table with one seed."""

    name: str
    trained: Trained
    seed: int
    after: str | None
    """The job that it begins from."""
    data: str | None = None
    """What it is measured on; None: it is not."""

    @property
    def blind(self) -> bool:
        return isinstance(self.trained, Cell) and self.trained.blind


def jobs(table: Comparison) -> list[Job]:
    """All runs, those that others begin from first; ConfigError for a configuration that is
    wrong."""
    out = []
    for seed in table.seeds:
        for name, run in table.runs.items():
            before = None if run.from_ is None else run_name(run.from_, seed)
            out.append(Job(run_name(name, seed), run, seed, before))
        for row in table.rows:
            for column, cell in row.cells.items():
                before = None if cell.from_ is None else run_name(cell.from_, seed)
                name = cell_name(row, column, seed)
                out.append(Job(name, cell, seed, before, table.columns[column].data))
    for job in out:
        configuration(table, job.name.rpartition("/seed-")[0], job.trained, job.seed)
    return out


def compare(table: Comparison, at_once: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and measure what is not yet, `at_once` runs at a time. Returns run -> metrics.

    LaunchError naming the run whose training or evaluation failed, with its last lines; the others
    that are under way are finished first.
    """
    todo = jobs(table)
    results = objects.join(table.storage, RESULTS)
    found = _read(results)
    done: set[str] = set()
    under_way: dict[Future[dict[str, Any]], Job] = {}
    problem: LaunchError | None = None
    began, total = time.monotonic(), len(todo)
    with ThreadPoolExecutor(at_once) as pool:
        while (todo and problem is None) or under_way:
            ready = [j for j in todo if j.after is None or j.after in done]
            for job in ready if problem is None else []:
                if len(under_way) == at_once:
                    break
                todo.remove(job)
                under_way[pool.submit(_do, table, job, found.get(job.name))] = job
            finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                job = under_way.pop(future)
                try:
                    metrics = future.result()
                except LaunchError as error:
                    problem = problem or error
                    continue
                done.add(job.name)
                minutes = (time.monotonic() - began) / 60
                shown = ""
                if metrics:
                    found[job.name] = metrics
                    objects.write_bytes(results, json.dumps(found, indent=1).encode())
                    shown = f": accuracy {metrics['accuracy']:.4f}" if "accuracy" in metrics else ""
                say(f"{len(done)} of {total} runs, {minutes:.1f} min | {job.name}{shown}")
    if problem:
        raise problem
    return found


def _read(results: str) -> dict[str, Any]:
    try:
        return dict(json.loads(objects.read_bytes(results)))
    except DataError:
        return {}
    except ValueError as error:
        raise ConfigError(
            f"{results} is not what a comparison writes ({error}): remove it"
        ) from None


def _do(table: Comparison, job: Job, before: dict[str, Any] | None) -> dict[str, Any]:
    """Train and measure a run; its metrics with what they are of."""
    name = job.name.rpartition("/seed-")[0]
    config = configuration(table, name, job.trained, job.seed)
    if _state(run_url(config)) != "done":
        given = [str(table.folder / job.trained.config)]
        _run(job, "train", *given, *overrides(table, name, job.trained, job.seed))
    if job.data is None:
        return {}
    of = f"{run_status(run_url(config)).generation} on {load_manifest(job.data).fingerprint}"
    if before and before.get("of") == of:
        return before
    more = ["--blind"] if job.blind else []
    text = _run(job, "evaluate", run_url(config), "--data", job.data, "--json", *more)
    return {**json.loads(text), "of": of}


def _state(url: str) -> str:
    try:
        return run_status(url).state
    except DataError:
        return "new"


def _run(job: Job, *arguments: str) -> str:
    """The output of an lxscale command; LaunchError where it fails."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if ended.returncode:
        last = "\n".join((ended.stdout + ended.stderr).splitlines()[-_LINES:])
        raise LaunchError(f"{job.name}: `lxscale {' '.join(arguments)}` failed:\n{last}")
    return ended.stdout
