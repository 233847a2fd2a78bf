"""Training and measuring the runs of a table (comparison.py), some at a time.

Each run and each evaluation is a process of its own. What is measured is kept beside the runs, so
that the same command goes on where it was cut; a run that is cut goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
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
    Column,
    Comparison,
    Trained,
    cell_name,
    configuration,
    overrides,
    run_name,
    used_runs,
)
from cluster.errors import USER_ERRORS, LaunchError
from cluster.launch import absolute_paths
from shards.errors import NotFoundError
from shards.format.manifest import load_manifest
from shards.store import objects
from trainer.checkpoint.generations import find_generation
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.run_status import run_config, run_status
from trainer.setup import run_url

# Sections that say what is learned, and keys of them that do not.
_TRAINED = ("data", "sampler", "model", "objectives", "optimizer", "train")
_FREE = ("log_every", "profile", "validate_every", "validation_batch", "init_from", "compile")

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
    column: Column | None = None
    """What is measured; None: nothing."""

    @property
    def blind(self) -> bool:
        return isinstance(self.trained, Cell) and self.trained.blind


def jobs(table: Comparison) -> list[Job]:
    """All runs, those that others begin from first. Cells that are trained alike are one run.
    ConfigError for a configuration that is wrong."""
    out: list[Job] = []
    for seed in table.seeds:
        trained: dict[tuple[object, ...], str] = {}

        def add(name: str, of: Trained, what: Column | None, seed: int = seed) -> None:
            same = trained.setdefault((of.config, of.set, of.from_), name)  # noqa: B023
            before = None if of.from_ is None else run_name(of.from_, seed)
            out.append(Job(name, same, of, seed, before if same == name else same, what))

        for name, run in used_runs(table).items():
            add(run_name(name, seed), run, None)
        for row in table.rows:
            for column, cell in row.cells.items():
                add(cell_name(row, column, seed), cell, table.columns[column])
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
    problem: Exception | None = None
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
                say(f"begins: {job.name}")
                under_way[pool.submit(_do, table, job, found.get(job.name), commands)] = job
            finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                job = under_way.pop(future)
                try:
                    metrics = future.result()
                except USER_ERRORS as error:
                    problem = problem or error
                    continue
                done.add(job.name)
                minutes = (time.monotonic() - began) / 60
                shown = ""
                found[job.name] = metrics
                objects.write_bytes(results, json.dumps(found, indent=1).encode())
                if job.column:
                    shown = f": {job.column.metric} {metrics[job.column.metric]:.4f}"
                say(f"{len(done)} of {total} runs, {minutes:.1f} min | {job.name}{shown}")
    if problem:
        raise problem
    return found


def _read(results: str) -> dict[str, Any]:
    try:
        found = json.loads(objects.read_bytes(results))
    except NotFoundError:
        return {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise ConfigError(f"{results} is not what a comparison writes: remove it")
    return found


def _do(
    table: Comparison, job: Job, before: dict[str, Any] | None, commands: _Commands
) -> dict[str, Any]:
    """Train and measure a run; its metrics with what they are of."""
    config = configuration(table, job.run, job.trained, job.seed)
    url, begins = run_url(config), ""
    if job.trained.from_ is not None:
        begins = _identity(f"{table.storage}/{run_name(job.trained.from_, job.seed)}")
    if _state(url) == "done":
        _check_same(url, config, begins, before)
    else:
        given = [str(table.folder / job.trained.config)]
        commands.run(job, "train", *given, *overrides(table, job.run, job.trained, job.seed))
    of = {"checkpoint": _identity(url), "begins from": begins}
    if job.column is None:
        return {"of": of}
    of |= {"data": load_manifest(job.column.data).fingerprint, "blind": str(job.blind)}
    if before and before.get("of") == of and job.column.metric in before:
        return before
    more = ["--blind"] if job.blind else []
    text = commands.run(job, "evaluate", url, "--data", job.column.data, "--json", *more)
    metrics = json.loads(text)
    if job.column.metric not in metrics:
        raise ConfigError(
            f"{job.name} has no metric {job.column.metric!r}: it has {', '.join(metrics)}"
        )
    return {**metrics, "of": of}


def _identity(url: str) -> str:
    """Of what a run has learned: another where it was trained anew."""
    return hashlib.sha256(objects.read_bytes(find_generation(url).url)).hexdigest()


def _check_same(url: str, config: RunConfig, begins: str, before: dict[str, Any] | None) -> None:
    """ConfigError where a run that is done was trained with other settings than the table now has,
    or began from a run that was trained anew since."""
    stored, given = run_config(url).model_dump(mode="json"), absolute_paths(config)
    now, named = given.model_dump(mode="json"), given.given()
    if stored["task"] != now["task"]:
        raise _another(url, "task")
    for section in _TRAINED:
        for key in named.get(section, {}):
            told = key in ("train", "text") if section == "data" else key not in _FREE
            if told and stored[section].get(key) != now[section][key]:
                raise _another(url, f"{section}.{key}")
    known = (before or {}).get("of", {})
    # What is known may be of a run that was here before this one.
    if known.get("checkpoint") == _identity(url) and known.get("begins from") != begins:
        raise ConfigError(
            f"{url} began from a run that was trained anew since: remove it, to train it again"
        )


def _another(url: str, key: str) -> ConfigError:
    return ConfigError(
        f"{url} was trained with another {key} than the table has now: remove the run, or give the "
        "row another name"
    )


def _state(url: str) -> str:
    try:
        return run_status(url).state
    except NotFoundError:
        return "new"


class _Commands:
    """The lxscale commands that are under way."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def run(self, job: Job, *arguments: str) -> str:
        """The output of a command; LaunchError where it fails."""
        if self._ended:
            raise LaunchError(f"{job.name}: the comparison is ending")
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
        """Have them save and end; none begins after."""
        self._ended = True
        for process in list(self._running):
            process.terminate()
