"""A run on Ray: groups of workers, one after the other, until it is done.

Ray places and ends; checkpoints and tensors are the trainer's own. A worker, a node or a link that
is lost costs a new group, which goes on from the last committed generation. What ends a run, and
with which error, is in `_verdict`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.bounded import StillBusyError, bounded
from cluster.budget import Budget, newest_generation
from cluster.environment import passed_on
from cluster.errors import FINAL_ERRORS, AgainError, LaunchError, LostError
from cluster.group import End, Group, Wishes, run
from cluster.growth import Growth
from cluster.local_ray import scratch
from cluster.nodes import unreachable
from cluster.placing import Freed, place
from cluster.ray_session import RaySession, ray_session
from cluster.stopping import Stop, stop_signals
from cluster.worker import Loop, Work
from trainer.checkpoint.lease import keep_job_lease
from trainer.checkpoint.owner import Claimant, check_free
from trainer.checkpoint.process import this_process
from trainer.config import RunConfig, parse_config
from trainer.loop import TrainResult, train
from trainer.setup import run_url
from trainer.timeline import Timeline

# Seconds for an answer of the store, for which nobody waits.
_STORE_S = 2.0


def launch(
    config: RunConfig,
    *,
    ray_address: str | None = None,
    loop: Loop = train,
    take_over: bool = False,
) -> TrainResult:
    """Run `loop` in as many of config.cluster.workers workers as there is room for; returns its
    result on rank 0.

    ray_address: a Ray cluster to join; None starts a local one and ends it. take_over: the run from
    a job that is alive.
    The first SIGINT, SIGTERM or SIGUSR1 asks for a clean stop (the loop saves and returns), a
    second SIGINT aborts. Raises one of FINAL_ERRORS with the worker's message; AgainError where the
    same command goes on; LaunchError otherwise.
    """
    began = time.time()
    config = absolute_paths(config)
    claimant = check_free(run_url(config), Claimant(take_over=take_over, driver=this_process()))
    work = Work(config.given(), loop, claimant)
    budget = Budget(config.cluster.max_failures, newest_generation(run_url(config)))
    with (
        scratch() as folder,
        stop_signals(config.cluster.stop_timeout_s) as stop,
        keep_job_lease(run_url(config), claimant.job),
        Timeline(run_url(config), claimant.job, began) as timeline,
    ):
        while True:
            with ray_session(config.cluster, ray_address, folder, stop) as session:
                end, budget = _groups(config, work, session, stop, budget, timeline)
                again = end.kind == "ray lost" and session.can_start_again() and not stop.asked()
            if not again:
                return _verdict(end, config, stop)
            _show(f"{end.text}; starting Ray again")


def _groups(
    config: RunConfig,
    work: Work,
    session: RaySession,
    stop: Stop,
    budget: Budget,
    timeline: Timeline,
) -> tuple[End, Budget]:
    """Groups one after the other; how the last one ended."""
    suspects: frozenset[str] = frozenset()
    freed = Freed()

    def avoid() -> frozenset[str]:
        return session.draining() | unreachable(suspects)

    while True:
        seen = _group(config, work, session, stop, avoid, freed, timeline)
        end, moving, lost = seen.end, seen.moving, session.lost()
        freed = Freed(seen.nodes, seen.room)
        if moving and not stop.asked() and end.stopped:
            if lost:
                return End("ray lost", lost), budget
            _show(f"{moving}; starting again {'with more' if seen.room else 'elsewhere'}")
            continue
        if not end.is_loss:
            return end, budget
        newest = newest_generation(run_url(config))
        budget = budget.after_failure(newest, end.made.since)
        if budget.spent or stop.asked():
            return end, budget
        if lost:
            return End("ray lost", lost), budget
        suspects |= end.nodes
        _show(f"{end.text}; starting again")


@dataclass(frozen=True)
class _Seen:
    """What a group was."""

    end: End
    nodes: tuple[str, ...] = ()
    """Of each worker."""
    moving: str = ""
    """Why it was asked to save and end, if the run is to go on."""
    room: int = 0
    """For so many workers, if that is why."""


def _group(
    config: RunConfig,
    work: Work,
    session: RaySession,
    stop: Stop,
    avoid: Callable[[], frozenset[str]],
    freed: Freed,
    timeline: Timeline,
) -> _Seen:
    """One group, from its placing to its end. freed: as `place`."""
    moving, room, since, said = "", 0, 0.0, False
    group: Group | None = None
    growth: Growth | None = None

    def wish() -> bool:
        nonlocal moving, room, since, said
        if stop.asked() and not said:
            said = True
            _show("stopping: the workers save a checkpoint; Ctrl-C once more to abort")
        leaving = group.nodes & session.draining() if group else frozenset()
        forced = session.lost() or (f"{len(leaving)} nodes are drained" if leaving else "")
        if forced and (not moving or room):
            moving, room, since = forced, 0, time.monotonic()
        elif not moving and growth and (room := growth.due()):
            if _store_answers(run_url(config)):
                moving = f"there is room for {room} workers"
            else:  # they could not save, and would have to wait for it
                room = 0
                growth.put_off()
        else:
            return stop.asked() or bool(moving)
        if moving:
            _show(f"{moving}: the workers save a checkpoint")
        return stop.asked() or bool(moving)

    def overdue() -> bool:
        # For more room nothing is given up: the workers save for as long as it takes.
        forced = moving and not room
        late = forced and time.monotonic() - since > config.cluster.stop_timeout_s
        return stop.overdue() or bool(late)

    wishes = Wishes(wish, overdue, _show)
    timeline.began()
    placed = place(config, passed_on(), avoid, wishes, freed)
    if isinstance(placed, End):
        timeline.ended(placed.kind, placed.text, placed.made, placed.quiet)
        timeline.gone()
        return _Seen(placed, moving=moving)
    group = placed
    timeline.placed(len(group.workers))
    try:
        growth = Growth(config, len(group.workers), avoid)
        end = run(group, work, config.cluster, wishes)
        stopped = end.kind == "done" and end.stopped
        kind, text = ("stopped", moving) if stopped else (end.kind, end.text)
        timeline.ended(kind, text, end.made, end.quiet)
    finally:
        # What is held for it first: the next group is to have all.
        if growth:
            growth.close()
        group.close()
        timeline.gone()
    return _Seen(end, tuple(p.node for p in group.placed), moving, room)


def _store_answers(url: str) -> bool:
    with contextlib.suppress(StillBusyError):
        return bounded(lambda: newest_generation(url), _STORE_S) is not None
    return False


def _verdict(end: End, config: RunConfig, stop: Stop) -> TrainResult:
    """The result of the run, or the one error that says why there is none."""
    cluster, goes_on = config.cluster, "the same command goes on from the last checkpoint"
    if end.kind == "done":
        result: TrainResult = end.result
        return result
    if end.failure and not end.is_loss:
        kinds = {kind.__name__: kind for kind in FINAL_ERRORS}
        raise kinds.get(end.failure.name, LaunchError)(end.failure.text)
    if end.kind == "stopped":
        raise AgainError(f"stopped before training began; {goes_on}")
    if end.kind == "overdue":
        raise AgainError(
            f"not saved within cluster.stop_timeout_s={cluster.stop_timeout_s:g}; {goes_on}"
        )
    if end.kind == "no room":
        raise AgainError(
            f"no room for {config.world_sizes[0]} workers {end.text}: wait for other jobs or "
            "nodes, or ask for less"
        )
    if stop.asked() or end.kind == "ray lost":
        raise LostError(f"{end.text}; {goes_on}")
    raise LostError(
        f"{end.text}: more than cluster.max_failures={cluster.max_failures} times without a new "
        f"checkpoint; {goes_on}"
    )


def _show(line: str) -> None:
    print(line, flush=True)


def absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths made absolute: workers have another working directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else os.path.abspath(path)

    given = config.given()
    given["data"]["train"] = (
        absolute(config.data.train)
        if isinstance(config.data.train, str)
        else [{**p, "url": absolute(p["url"])} for p in given["data"]["train"]]
    )
    for section, keys in (
        ("run", ("storage", "tensorboard")),
        ("data", ("validation", "cache")),
        ("train", ("init_from", "init_answers")),
        ("checkpoint", ("fast_folder",)),
    ):
        for key in keys:
            value = absolute(getattr(getattr(config, section), key))
            if key == "storage" or key in given.get(section, {}):
                given.setdefault(section, {})[key] = value
    return parse_config(given, "the configuration")
