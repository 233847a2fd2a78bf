"""A group of workers: watched while they train, ended together. How one comes to be: placing.py.

How one ends is plain data (`End`); what follows from that is launch.py's. The driver asks every
worker how it is twice a second: messages grow with workers, and not with anything else.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from cluster.bounded import bounded
from cluster.worker import Failure, Placed, Report, Seat, Work
from shards.store.retry import Retry
from trainer.checkpoint.lease import Made
from trainer.sections import ClusterSection

# Seconds between two questions to a worker, and between two looks for answers.
_ASK_S, _LOOK_S = 0.5, 0.1
# Seconds to wait, after a worker's failure, for those of others that may be its cause.
_CAUSES_S = 2.0
# Seconds between two looks of a driver that sleeps, or waits for Ray or the store.
_GAP_S = 2.0
# Seconds to give room back: for ever, where Ray's head is gone.
_CLOSE_S = 3.0


@dataclass(frozen=True)
class End:
    """How a group ended."""

    kind: str
    """done, with a result; failed, by an exception in a worker; lost, with a worker or all; hung;
    no room; stopped, before there was anything to save; overdue, where it did not stop in time."""
    text: str = ""
    result: Any = None
    failure: Failure | None = None
    nodes: frozenset[str] = frozenset()
    """Those of lost workers."""
    made: Made = field(default_factory=Made)
    """What rank 0 has done, as far as it was heard of."""
    quiet: float = 0.0
    """Seconds from the last sign of progress to the end that was found."""

    @property
    def is_loss(self) -> bool:
        """Whether it ended by no fault of the run's own, as what was lost may be there again."""
        lost = self.failure is not None and self.failure.kind == "lost"
        return lost or self.kind in ("lost", "hung")

    @property
    def stopped(self) -> bool:
        """Whether it ended early because it was asked to."""
        early = self.kind in ("stopped", "overdue")
        return early or (self.kind == "done" and getattr(self.result, "stopped", False))


@dataclass(frozen=True)
class Wishes:
    """What the driver is told while it watches."""

    stop: Callable[[], bool]
    """Whether all are to save and end."""
    overdue: Callable[[], bool]
    """Whether that has been wished for too long."""
    show: Callable[[str], None]
    """Takes a line of output."""


class Group:
    """Workers that are placed. `close` ends them."""

    def __init__(self, room: Any, workers: list[Any], placed: list[Placed]) -> None:
        """room: Ray's placement group."""
        self._room, self.workers, self.placed = room, workers, placed

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(p.node for p in self.placed)

    def close(self) -> None:
        close(self._room, self.workers)


def close(room: Any, workers: Sequence[Any] = ()) -> None:
    """End workers and give their room back."""
    # Ray kills them at once, and those that are stopped (SIGSTOP) after five seconds.
    for worker in workers:
        with contextlib.suppress(Exception):
            ray.kill(worker)
    with contextlib.suppress(Exception):
        bounded(lambda: remove_placement_group(room), _CLOSE_S)


# --- watching -----------------------------------------------------------------------------------


def seats(placed: Sequence[Placed], master: tuple[str, int]) -> list[Seat]:
    """The part of each worker, given in the order of ranks."""
    found, before = [], Counter[str]()
    for rank, worker in enumerate(placed):
        local = 0 if worker.gpu else before[worker.node]
        found.append(Seat(rank, len(placed), local, worker.gpu, master))
        before[worker.node] += 1
    return found


@dataclass
class _Watched:
    """One worker, as the driver sees it."""

    report: Report
    heard: float
    """When (time.monotonic) that came."""
    question: Any = None
    """The exchange that is not answered yet."""


def run(group: Group, work: Work, cluster: ClusterSection, wishes: Wishes) -> End:
    """Have the group do its work, and watch it; how it ended. The group still has to be closed."""
    now = time.monotonic()
    watched = [_Watched(Report(), now) for _ in group.workers]
    return _accounted(_watch(group, work, cluster, wishes, watched), watched)


def _watch(
    group: Group,
    work: Work,
    cluster: ClusterSection,
    wishes: Wishes,
    watched: list[_Watched],
) -> End:
    workers, world = group.workers, len(group.workers)
    try:
        address = group.placed[0].address
        port = ray.get(workers[0].listen.remote(address), timeout=cluster.hang_timeout_s)
    except (ray.exceptions.RayError, TimeoutError) as error:
        return _lost(group, [0], first_line(error))
    parts = seats(group.placed, (address, port))
    running = {w.work.remote(work, seat): seat.rank for w, seat in zip(workers, parts, strict=True)}
    for w in watched:
        w.heard = time.monotonic()
    results: dict[int, Any] = {}
    failed_at, looked = None, time.monotonic()
    while True:
        ended, _ = ray.wait(list(running), timeout=_LOOK_S)
        lost = _take_results(ended, running, results)
        lost += _exchange(workers, watched, results, wishes)
        now = time.monotonic()
        if (gap := now - looked) > _GAP_S:  # this process was held up, and asked nobody
            for w in watched:
                w.heard += gap
        looked = now
        silent = [
            rank
            for rank, w in enumerate(watched)
            if rank not in results and now - w.heard > cluster.hang_timeout_s
        ]
        if lost:
            return _lost(group, lost, quiet=now - min(watched[rank].heard for rank in lost))
        if len(results) == world and not any(isinstance(r, Failure) for r in results.values()):
            _last_words(workers, watched, wishes)
            return End("done", result=results[0])
        if any(isinstance(r, Failure) for r in results.values()):
            failed_at = failed_at or now
            if len(results) == world or now - failed_at > _CAUSES_S:
                _last_words(workers, watched, wishes)
                failure = _cause([r for r in results.values() if isinstance(r, Failure)])
                quiet = time.monotonic() - failed_at
                return End("failed", failure.text, failure=failure, quiet=quiet)
        if silent:
            why = f"no answer for {cluster.hang_timeout_s:g} s"
            return _lost(group, silent, why, now - min(watched[rank].heard for rank in silent))
        if wishes.overdue():
            return End("overdue")
        if failed_at is None and (text := hang([w.report for w in watched], cluster)):
            return End("hung", text, quiet=min(w.report.age + now - w.heard for w in watched))


def _take_results(ended: list[Any], running: dict[Any, int], results: dict[int, Any]) -> list[int]:
    """Put away what has ended; ranks of workers that are gone."""
    lost = []
    for ref in ended:
        rank = running.pop(ref)
        try:
            results[rank] = ray.get(ref)
        except ray.exceptions.RayError:
            lost.append(rank)
    return lost


def _exchange(
    workers: Sequence[Any], watched: list[_Watched], results: dict[int, Any], wishes: Wishes
) -> list[int]:
    """Take the answers that are there and ask those who have answered; ranks of the lost."""
    lost = []
    stop = wishes.stop()
    now = time.monotonic()
    asked = {w.question: rank for rank, w in enumerate(watched) if w.question is not None}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
    for ref in answered:
        rank = asked[ref]
        try:
            report: Report = ray.get(ref)
        except ray.exceptions.RayError:
            if rank not in results:
                lost.append(rank)
            continue
        watched[rank] = _Watched(report, now)
        for line in report.lines:
            wishes.show(line)
    for rank, w in enumerate(watched):
        due = rank not in results and now - w.heard >= _ASK_S
        if w.question is None and (due or w.report.phase == "start"):
            w.question = workers[rank].exchange.remote(stop)
    return lost


def _last_words(workers: Sequence[Any], watched: list[_Watched], wishes: Wishes) -> None:
    """Show what the workers have not told yet, in answers under way and in new ones."""
    questions = {w.question: rank for rank, w in enumerate(watched) if w.question is not None}
    questions |= {w.exchange.remote(False): rank for rank, w in enumerate(workers)}
    ready, _ = ray.wait(list(questions), num_returns=len(questions), timeout=2)
    for ref in (r for r in questions if r in ready):
        with contextlib.suppress(ray.exceptions.RayError):
            report = ray.get(ref)
            watched[questions[ref]] = _Watched(report, time.monotonic())
            for line in report.lines:
                wishes.show(line)


def _accounted(end: End, watched: Sequence[_Watched]) -> End:
    """With what rank 0 has done to the last sign of progress, what it was at then included."""
    first = watched[0]
    made, report = first.report.made, first.report
    since_heard = time.monotonic() - end.quiet - first.heard
    told = end.kind in ("done", "failed")  # by the loop itself, at its end
    open_ = 0.0 if told else max(0.0, report.age + since_heard)
    spent = {**made.spent, report.phase: made.spent.get(report.phase, 0.0) + open_}
    return replace(end, made=replace(made, spent=spent))


def _lost(group: Group, ranks: Sequence[int], why: str = "", quiet: float = 0.0) -> End:
    names = ", ".join(map(str, sorted(set(ranks))))
    why = why or "killed, crashed, out of memory or unreachable"
    nodes = frozenset(group.placed[r].node for r in ranks)
    return End("lost", f"lost worker {names} ({why})", nodes=nodes, quiet=quiet)


def _cause(failures: Sequence[Failure]) -> Failure:
    """The failure that explains the others: peers of one that failed see broken connections."""
    order = ("user", "again", "code", "lost")
    return min(failures, key=lambda f: order.index(f.kind))


def first_line(error: BaseException) -> str:
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        cause = error.cause  # before it, Ray's text has where it was raised
        return f"{type(cause).__name__}: {first_line(cause)}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- hangs --------------------------------------------------------------------------------------

_HANG_FACTOR = 10


def hang(reports: Sequence[Report], cluster: ClusterSection) -> str:
    """What hangs, or "": all workers are at something for longer than that may take. One that is
    busy, as with a slow store, is waited for by the others, which do not hang."""
    limits = [phase_limit(r, cluster) for r in reports]
    if any(r.age <= limit for r, limit in zip(reports, limits, strict=True)):
        return ""
    rank = max(range(len(reports)), key=lambda i: reports[i].age)
    report = reports[rank]
    return f"no progress for {report.age:.0f} s (worker {rank} at {report.phase!r} longest)"


def phase_limit(report: Report, cluster: ClusterSection) -> float:
    """Seconds that what a worker is at may take."""
    if report.phase in ("agreement", "step") and report.median is not None:
        return max(cluster.hang_timeout_s, _HANG_FACTOR * report.median)
    if report.phase == "data":
        return Retry().deadline + cluster.hang_timeout_s
    # Starts, validations and saves are as long as data and model are large; torch's own timeout
    # ends a collective that hangs in them.
    return cluster.process_group_timeout_s + cluster.hang_timeout_s
