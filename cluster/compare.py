"""Training and measuring the runs of a table (comparison.py), some at a time.

Each run and each evaluation is a process of its own. What is measured is kept beside the runs, so
that the same command goes on where it was cut; a run that is cut goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
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
    used_runs,
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
    """A run of the table with one seed, or a cell of it."""

    name: str
    run: str
    """What is trained, or was by the job of that name."""
    trained: Trained
    seed: int
    after: str | None
    """The job that must be done before."""
    data: str | None = None
    """What it is measured on; None: it is not."""

    @property
    def blind(self) -> bool:
        return isinstance(self.trained, Cell) and self.trained.blind


def jobs(table: Comparison) -> list[Job]:
    """All runs, those that others begin from first. Cells that are trained alike are one run.
    ConfigError for a configuration that is wrong."""
    out: list[Job] = []
    for seed in table.seeds:
        trained: dict[tuple[object, ...], str] = {}

        def add(name: str, of: Trained, data: str | None, seed: int = seed) -> None:
            same = trained.setdefault((of.config, of.set, of.from_), name)  # noqa: B023
            before = None if of.from_ is None else run_name(of.from_, seed)
            out.append(Job(name, same, of, seed, before if same == name else same, data))

        for name, run in used_runs(table).items():
            add(run_name(name, seed), run, None)
        for row in table.rows:
            for column, cell in row.cells.items():
                add(cell_name(row, column, seed), cell, table.columns[column].data)
    for job in out:
        configuration(table, job.run, job.trained, job.seed)
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
    commands = _Commands()
    with ThreadPoolExecutor(at_once) as pool, contextlib.ExitStack() as stack:
        # However this ends, nothing goes on without it.
        stack.callback(commands.end)
        while (todo and problem is None) or under_way:
            ready = [j for j in todo if j.after is None or j.after in done]
            for job in ready if problem is None else []:
                if len(under_way) == at_once:
                    break
                todo.remove(job)
                under_way[pool.submit(_do, table, job, found.get(job.name), commands)] = job
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


def _do(
    table: Comparison, job: Job, before: dict[str, Any] | None, commands: _Commands
) -> dict[str, Any]:
    """Train and measure a run; its metrics with what they are of."""
    config = configuration(table, job.run, job.trained, job.seed)
    if _state(run_url(config)) != "done":
        given = [str(table.folder / job.trained.config)]
        commands.run(job, "train", *given, *overrides(table, job.run, job.trained, job.seed))
    if job.data is None:
        return {}
    of = f"{run_status(run_url(config)).generation} on {load_manifest(job.data).fingerprint}"
    if before and before.get("of") == of:
        return before
    more = ["--blind"] if job.blind else []
    text = commands.run(job, "evaluate", run_url(config), "--data", job.data, "--json", *more)
    return {**json.loads(text), "of": of}


def _state(url: str) -> str:
    try:
        return run_status(url).state
    except DataError:
        return "new"


class _Commands:
    """The lxscale commands that are under way."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, job: Job, *arguments: str) -> str:
        """The output of a command; LaunchError where it fails."""
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._running.add(process)
        try:
            out, err = process.communicate()
        finally:
            self._running.discard(process)
        if process.returncode:
            last = "\n".join((out + err).splitlines()[-_LINES:])
            raise LaunchError(f"{job.name}: `lxscale {' '.join(arguments)}` failed:\n{last}")
        return out

    def end(self) -> None:
        """Have them save and end."""
        for process in list(self._running):
            process.terminate()
