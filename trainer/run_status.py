"""How a run stands, from its storage alone: no cluster is asked, and none needs to live.

Cost of one run: its folder's lists, its newest manifest, the manifests of its data sets where the
run's length is in epochs, and, where its owner does not say how it ended, some seconds of looking
whether its lease changes. It grows with the run's saves as a listing does, with its goodput by a
small request for each, and not with shards.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from shards.errors import DataError, NotFoundError
from shards.format.manifest import Manifest, load_manifest
from shards.store import objects
from trainer.checkpoint.chain import Traces, read_traces
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import lease_url
from trainer.checkpoint.generations import Generation, generations
from trainer.checkpoint.lease import Lease, parse_lease, read_lease
from trainer.checkpoint.line import has_gone_on
from trainer.checkpoint.owner import is_owned, lease_name
from trainer.config import RunConfig, read_config
from trainer.errors import ConfigError
from trainer.goodput import goodput_share
from trainer.setup import CONFIG_FILE, epoch_pairs, run_length

State = Literal["new", "running", "done", "stopped", "dead", "unreadable"]

# Folders of a run, in which no other run is.
_OWN = ("attempts", "checkpoints", "tensorboard", "timeline")
# Folders that a run's name may have above it, below the place that is listed.
_DEEPEST = 4
# Runs and folders that are read at once.
_AT_ONCE = 16


@dataclass(frozen=True)
class RunStatus:
    """What a run's storage says of it."""

    url: str
    state: State
    """new: nothing has begun; running: its owner lives; done; stopped: its owner has ended in good
    order, before the last step; dead: its owner is gone; unreadable: see `problem`."""
    step: int = 0
    """Of the newest whole generation."""
    total: int | None = None
    """Steps of the whole run; None where its length is in epochs, and its data are out of reach."""
    generation: str = ""
    """The newest one's name; "" for none."""
    saved: float | None = None
    """When that was written, in seconds since the epoch by the store's clock."""
    attempt: int = 0
    owner: str = ""
    """Who began that attempt."""
    goodput: float | None = None
    """Kept step time of all time, 0 to 1; None where that is not known, or was not asked for."""
    problem: str = ""


def run_config(url: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run has in its storage, with overrides applied. NotFoundError where
    there is none, ConfigError where it does not fit."""
    where = objects.join(url, CONFIG_FILE)
    try:
        data = objects.read_bytes(where)
    except NotFoundError:
        raise NotFoundError(
            f"{url} is no run: it has no {CONFIG_FILE} (`lxscale runs URL` lists a storage's)"
        ) from None
    return read_config(data, where, overrides)


def run_status(url: str, goodput: bool = False) -> RunStatus:
    """How the run stands; goodput: with that, at a small request for each save.

    Raises NotFoundError where there is no run, DataError where its storage cannot be reached,
    CheckpointError or ConfigError where it cannot be read.
    """
    traces = read_traces(url)
    try:
        config = run_config(url)
    except NotFoundError:
        if not traces.attempt:
            raise
        config = None  # claimed, and nothing written yet
    newest, problem = _newest(url)
    step = newest.step if newest else 0
    total = _total(config, newest) if config else None
    mark = traces.claim_of(traces.attempt)
    return RunStatus(
        url,
        _state(traces, config, newest, total),
        step,
        total,
        newest.name.removesuffix(".json") if newest else "",
        _modified(newest.url) if newest else None,
        traces.attempt,
        mark.who if mark else "",
        goodput_share(url) if newest and goodput else None,
        problem,
    )


def _modified(url: str) -> float | None:
    try:
        return objects.look_up(url).modified
    except NotFoundError:
        return None  # its owner has pruned it since


def _newest(url: str) -> tuple[Generation | None, str]:
    """The newest whole generation, and what is wrong with one that is newer."""
    problem = ""
    for found in generations(url):
        if isinstance(found, Generation):
            return found, problem
        problem = problem or found
    return None, problem


def _total(config: RunConfig, newest: Generation | None) -> int | None:
    step, consumed = (newest.step, newest.manifest.sampler.consumed) if newest else (0, 0)
    if config.train.steps is not None:
        return max(config.train.steps, step)
    try:
        pairs = epoch_pairs(config, [_manifest(spec.url) for spec in config.data.specs()])
    except DataError:
        return None
    return run_length(config, pairs, step, consumed).steps


@functools.cache
def _manifest(data_url: str) -> Manifest:
    """Of a data set; read once, as what a data set consists of does not change under a run."""
    return load_manifest(data_url)


def _state(
    traces: Traces, config: RunConfig | None, newest: Generation | None, total: int | None
) -> State:
    if not traces.attempt:
        return "new"
    if is_owned(traces):
        return "running"
    if config and (newest.step if newest else 0) == total:
        back = config.checkpoint.resume_from
        if back is None or (newest and has_gone_on(newest, back)):
            return "done"
    mark = traces.claim_of(traces.attempt)
    if mark:
        where = lease_url(traces.run_url, lease_name(mark))
        try:
            lease = parse_lease(read_lease(where), where)
        except CheckpointError:
            lease = None
        if isinstance(lease, Lease) and lease.state == "ended":
            return "stopped"
    return "dead"


# --- all runs of a storage ------------------------------------------------------------------------


def run_statuses(storage: str) -> Iterator[RunStatus]:
    """How each run below a storage URL stands, by name, some at a time. One that cannot be read is
    told as such. The work grows with runs, and with folders that are none."""
    with ThreadPoolExecutor(_AT_ONCE, "lxscale-runs") as threads:
        yield from threads.map(_status_or_problem, find_runs(storage))


def _status_or_problem(url: str) -> RunStatus:
    try:
        return run_status(url, goodput=True)
    except (DataError, CheckpointError, ConfigError) as error:
        return RunStatus(url, "unreadable", problem=str(error))


def find_runs(storage: str) -> list[str]:
    """URLs of the runs below a storage URL, at most _DEEPEST folders deep, sorted."""
    found, level = [], [storage.rstrip("/")]
    with ThreadPoolExecutor(_AT_ONCE, "lxscale-runs") as threads:
        for _ in range(_DEEPEST + 1):
            below: list[str] = []
            folders = threads.map(objects.list_folder, level)
            for url, (files, names) in zip(level, folders, strict=True):
                is_run = CONFIG_FILE in files
                if is_run:
                    found.append(url)
                # A data set's folder may have any number of files, and no runs.
                if "manifest.json" not in files:
                    below += [objects.join(url, n) for n in names if not (is_run and n in _OWN)]
            level = below
    return sorted(found)
