"""What happens to the nodes of goodput.py's runs, and when.

The trace: when spot nodes came and went in 11.4 hours, `milliseconds,add|remove,node`. Time is
scaled linearly; the number of nodes there, up to 32, by 4/32, rounded half up, and at least 1. So
one node of ours stands for eight, and comes or goes where the eighth part of them does. The oldest
goes first.

The drains: a run of 1,600 steps with a checkpoint every 400 is hit at steps 480, 660, 900 and 1277.
What always goes back to the last multiple of 400 loses 80 + 260 + 100 + 77 = 517 steps, as Ray's
own case does without notice (ray-project/ray#65047; 91 with it). A spare node comes just before, so
that there is room for four workers at any time.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from goodput_steps import NODES

TRACE = Path(__file__).parents[1].parent / "shared" / "data" / "spot_p3_trace.csv"
STEPS, EVERY = 1600, 400
DRAINS = (480, 660, 900, 1277)


@dataclass(frozen=True)
class Event:
    kind: Literal["add", "warn", "remove"]
    """warn: the node will be removed soon. A removal that was warned of waits for the whole notice
    to be over."""
    at: float = 0.0
    """Not before so many seconds after the run's start, nor before the event before."""
    step: int = 0
    """Nor before this step has been made for the first time."""


@dataclass(frozen=True)
class Scenario:
    name: str
    steps: int
    """Of the whole run; more than there is time for where `seconds` ends it."""
    every: int
    """Steps between checkpoints."""
    nodes: int
    """At the start."""
    events: tuple[Event, ...]
    seconds: float | None
    """The run is ended after so long; None: at its last step."""


def trace(path: Path, minutes: float, notice: float, step_seconds: float) -> Scenario:
    """The trace in so many minutes. A checkpoint is due as often as in `drains`: each EVERY/STEPS
    of the steps that NODES nodes could make. notice: seconds; 0 gives none."""
    counts = scaled(path, minutes * 60)
    events: list[Event] = []
    for (_, before), (at, now) in pairwise(counts):
        for _ in range(now - before):
            events.append(Event("add", at))
        for _ in range(before - now):
            if notice:
                events.append(Event("warn", max(0.0, at - notice)))
            events.append(Event("remove", at))
    events.sort(key=lambda e: e.at)  # stable: a warning stays before its removal
    most = round(minutes * 60 / step_seconds)
    every = max(1, most * EVERY // STEPS)
    return Scenario("trace", 10 * most, every, counts[0][1], tuple(events), minutes * 60)


def scaled(path: Path, seconds: float) -> list[tuple[float, int]]:
    """(second, nodes from then on) of each change, from 0 on."""
    rows = [(int(at), kind) for at, kind, _ in csv.reader(path.open())]
    there: dict[int, int] = {}
    now = most = 0
    for at, kind in rows:
        now += 1 if kind == "add" else -1
        there[at] = now  # after all of that moment
    most, end = max(there.values()), rows[-1][0]
    out: list[tuple[float, int]] = []
    for at, count in there.items():
        nodes = max(1, int(count * NODES / most + 0.5))
        if not out or out[-1][1] != nodes:
            out.append((at / end * seconds, nodes))
    return out


def drains(steps: int, notice: float) -> Scenario:
    """Four nodes that go, each replaced before; steps and checkpoints in the same proportions as
    those of 1,600."""
    events: list[Event] = []
    for at in DRAINS:
        events.append(Event("add", step=at * steps // STEPS))
        events += [Event("warn"), Event("remove")] if notice else [Event("remove")]
    return Scenario("drains", steps, max(1, EVERY * steps // STEPS), NODES, tuple(events), None)
