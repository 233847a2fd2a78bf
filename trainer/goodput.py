"""Goodput: what part of a run's time went into steps that are kept, and where the rest went.

From the run's storage alone: the seconds of each step from the newest generation's journal, the
groups of workers from the timeline (trainer/timeline.py), and of those whose driver was killed the
leases, which are up to two seconds older than that. The wall is from the first group's begin to the
last sign of the last one, in parts that sum to it:

    kept          steps that the newest generation holds
    unsaved       steps of a group that has not ended, which no generation holds yet
    lost          steps that a fault undid, and those that it cut short
    checkpoint    training stood still for a save, or waited for the last one at an end
    validation
    start-up      until the first step of the run: room, workers, model
    detect        from the last sign of progress until a fault was found
    tear down     until the workers were ended
    re-form       room, workers, process group and model, for all groups but the first
    restore       the newest generation found and read
    away          no job existed
    other         what is not known

`replay` is a part of the kept time: that of steps which had been made before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shards.errors import NotFoundError
from shards.store import objects
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import LEASE_PATTERN, SegmentEntry, lease_url
from trainer.checkpoint.generations import Generation, generations
from trainer.checkpoint.journal import StepLine, read_segments
from trainer.checkpoint.lease import Lease, parse_lease
from trainer.timeline import Group, at_once, read_timeline

PARTS = (
    "kept",
    "unsaved",
    "lost",
    "checkpoint",
    "validation",
    "start-up",
    "detect",
    "tear down",
    "re-form",
    "restore",
    "away",
    "other",
)

Seconds = dict[str, float]
StepSeconds = dict[int, float | None]
"""Seconds of each kept step; None where they were not written down."""


@dataclass(frozen=True)
class Part:
    """A group of workers, or the time before one in which there was no job."""

    kind: str
    """How it ended, as the timeline says; killed, with its driver, which wrote no end; open, where
    none may have come yet; or away."""
    began: float
    """Seconds since 1970, as is the next."""
    ended: float
    seconds: Seconds
    """By PARTS; they sum to its time."""
    text: str = ""
    attempt: int = 0
    """0: unknown, or none was begun."""
    workers: int = 0
    since: int = 0
    """The step that it went on from."""
    step: int = 0
    """The last that it is known to have made."""
    lost_steps: int = 0
    unsaved_steps: int = 0
    replay: float = 0.0
    """Of the kept seconds, those of steps that had been made before."""


@dataclass(frozen=True)
class Goodput:
    run: str
    step: int
    """Of the newest generation."""
    wall: float
    """Seconds from the first begin to the last sign; 0 where nothing is known."""
    lost_steps: int
    """Made and undone."""
    unsaved_steps: int
    replay: float
    unknown_steps: int
    """Kept steps whose time is not known: of an older lxscale, or of damaged segments. It is in
    `other`, or before the wall's begin."""
    seconds: Seconds
    """By PARTS; they sum to the wall."""
    parts: tuple[Part, ...] = field(repr=False)
    """In the order of time."""

    @property
    def share(self) -> float | None:
        """Kept step time / wall; None where nothing is known."""
        return self.seconds["kept"] / self.wall if self.wall else None

    @property
    def share_of_jobs(self) -> float | None:
        """The same of the time in which there was a job."""
        present = self.wall - self.seconds["away"]
        return self.seconds["kept"] / present if present else None

    @property
    def faults(self) -> int:
        return sum(p.kind in ("lost", "hung", "failed", "killed") for p in self.parts)


def goodput_share(run_url: str) -> float | None:
    """For a table: kept step time / wall; None where the storage does not say."""
    try:
        return goodput_of(run_url).share
    except CheckpointError:
        return None


def goodput_of(run_url: str) -> Goodput:
    """The goodput of a run's folder or URL.

    Costs two listings, the newest manifest, one small request for each group of workers that there
    has been and for each segment of its journal (one a save), 16 at a time. Raises CheckpointError
    where there is neither a generation nor a timeline, DataError where the store cannot be reached.
    """
    groups = read_timeline(run_url)
    newest = next((g for g in generations(run_url) if isinstance(g, Generation)), None)
    if not groups and newest is None:
        raise CheckpointError(f"no run under {run_url}: name a run's folder or URL")
    lines = _lines(newest) if newest else {}
    found = sum_up(_with_leases(run_url, groups), lines, newest.step if newest else 0)
    return replace(found, run=run_url)


def _lines(newest: Generation) -> StepSeconds:
    def read(entry: SegmentEntry) -> list[StepLine]:
        try:
            return [x for _, lines in read_segments(newest.run_url, [entry]) for x in lines]
        except CheckpointError:
            return []  # damaged

    segments = at_once(read, newest.manifest.journal)
    return {line.step: line.seconds for lines in segments for line in lines}


# --- groups whose driver was killed -------------------------------------------------------------


def _with_leases(run_url: str, groups: Sequence[Group]) -> list[Group]:
    """Groups without an end get the last sign of life of their attempt, where there is a lease."""
    if all(g.gone is not None for g in groups):
        return list(groups)
    known = {g.made.attempt for g in groups}
    found = map(LEASE_PATTERN.fullmatch, objects.list_names(lease_url(run_url)))
    names = [m[0] for m in found if m and int(m["attempt"]) not in known]
    leases = at_once(lambda name: _lease(lease_url(run_url, name)), names)
    ends = [*(g.began for g in groups[1:]), math.inf]
    return [
        g if g.gone is not None else _as_leased(g, end, leases)
        for g, end in zip(groups, ends, strict=True)
    ]


def _as_leased(group: Group, end: float, leases: Sequence[Lease | None]) -> Group:
    """With what the leases say of its attempt. end: the next group's begin."""
    own = [(x.attempt, x.made, x.at) for x in leases if x and x.job == group.job and x.made]
    own = [x for x in own if group.began <= x[1].begun < end]
    if not own:
        return group
    _, made, at = max(own, key=lambda x: x[0])
    return replace(group, made=made, quiet=at)


def _lease(url: str) -> Lease | None:
    try:
        return parse_lease(objects.read_bytes(url), url)
    except (NotFoundError, CheckpointError):
        return None


# --- sums ---------------------------------------------------------------------------------------


def sum_up(groups: Sequence[Group], lines: StepSeconds, step: int) -> Goodput:
    """The account of groups in the order of their begin. lines: the kept steps' seconds; step: the
    newest generation's."""
    parts: list[Part] = []
    reached, first, job = 0, True, ""
    next_ones = [*groups[1:], None][: len(groups)]
    for group, after, bound in zip(groups, next_ones, _bounds(groups, step), strict=True):
        began, ended = group.began, _end(group, after)
        if parts:
            gap = began - parts[-1].ended
            if gap > 0 and job != group.job:
                parts.append(Part("away", parts[-1].ended, began, seconds={"away": gap}))
            began = parts[-1].ended  # where two jobs overlap, the time is the first one's
        job = group.job
        if ended < began or (parts and ended == began):
            continue
        parts.append(_part(group, began, ended, bound, lines, reached, first, after is None))
        reached, first = max(reached, parts[-1].step), first and not group.made.attempt
    begin = next((g.made.since for g in groups if g.made.attempt), step)
    return Goodput(
        run="",
        step=step,
        wall=parts[-1].ended - parts[0].began if parts else 0.0,
        lost_steps=sum(p.lost_steps for p in parts),
        unsaved_steps=sum(p.unsaved_steps for p in parts),
        replay=sum(p.replay for p in parts),
        unknown_steps=sum(s <= begin or lines.get(s) is None for s in range(1, step + 1)),
        seconds={name: sum(p.seconds.get(name, 0.0) for p in parts) for name in PARTS},
        parts=tuple(parts),
    )


def _bounds(groups: Sequence[Group], step: int) -> list[int]:
    """The last step of each group that is kept: where the first of the later ones went on from."""
    bounds: list[int] = []
    first: int | None = None
    for group in reversed(groups):
        bounds.append(step if first is None else first)
        if group.made.attempt:
            since = group.made.since
            first = since if first is None else min(first, since)
    return bounds[::-1]


def _end(group: Group, after: Group | None) -> float:
    """When a group was gone, as far as that is known. after: the next one."""
    if group.gone is not None:
        return group.gone
    if after and after.job == group.job:
        return after.began  # its driver lived on
    return group.quiet or group.placed or group.began


def _part(
    group: Group,
    began: float,
    ended: float,
    bound: int,
    lines: StepSeconds,
    reached: int,
    first: bool,
    last: bool,
) -> Part:
    """A group's time, shared out. bound: the last of its steps that are kept; reached: the last
    that groups before it made; first: of all that trained; last: of all."""
    made = group.made
    since = made.since if made.attempt else bound
    bound = max(bound, since)
    step = max(made.step if made.attempt else since, bound)
    own = [lines.get(s) for s in range(since + 1, bound + 1)]
    kept = sum(s for s in own if s is not None)
    is_open = last and group.gone is None
    steps_spent = sum(made.spent.get(phase, 0.0) for phase in ("data", "agreement", "step"))
    undone = step > bound or is_open or group.kind not in ("done", "stopped")
    rest = "other" if None in own or not undone else "unsaved" if is_open else "lost"
    placed = group.placed or ended
    forming = placed - group.began + made.spent.get("start", 0.0)
    forming += made.begun - placed if made.begun else 0.0
    wanted = [
        ("kept", kept),
        (rest, steps_spent - kept),
        ("checkpoint", made.spent.get("save", 0.0) + made.spent.get("end", 0.0)),
        ("validation", made.spent.get("validation", 0.0)),
        ("restore", made.spent.get("restore", 0.0)),
        ("detect", (group.found or 0.0) - (group.quiet or 0.0) if group.found else 0.0),
        ("tear down", ended - group.found if group.found else 0.0),
        ("start-up" if first else "re-form", forming),
    ]
    seconds: Seconds = {}
    left = ended - began
    for name, wish in wanted:
        given = min(max(wish, 0.0), left)
        seconds[name] = seconds.get(name, 0.0) + given
        left -= given
    seconds["other"] = seconds.get("other", 0.0) + left
    again = [lines.get(s) or 0.0 for s in range(since + 1, min(bound, reached) + 1)]
    return Part(
        kind=group.kind or ("open" if last else "killed"),
        began=began,
        ended=ended,
        text=group.text,
        attempt=made.attempt,
        workers=group.workers,
        since=since,
        step=step,
        lost_steps=0 if is_open else step - bound,
        unsaved_steps=step - bound if is_open else 0,
        seconds=seconds,
        replay=min(sum(again), seconds["kept"]),
    )
