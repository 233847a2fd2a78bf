"""Goodput on nodes that come and go: python benchmarks/goodput.py [--quick] [--out FILE]

Three arms (goodput_arms.py) go through two scenarios (goodput_scenarios.py), each with notice of a
node's end and without. All train the same small LXMERT with the same batch, at the same pace
(goodput_steps.py), and save as often. What an arm made and had to make again is counted from the
same log of its steps; of ours, what `lxscale goodput` and the audit say stands beside it. The
columns: goodput_steps.py's Account.

Settings of ours: cluster.workers 1..4, grow_after_s 30, max_failures -1, the rest as it comes;
checkpoint.fast_every as --fast-every says. Ray Train's: goodput_ray.py.

All of it takes two hours. --record keeps each run's result in a file: what it has of the same
settings is not run again and is in the report, so that it can be done in pieces.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from goodput_arms import Arm, Ours, RayTrain, RestartAll, prepare_environment
from goodput_plain import Spec
from goodput_scenarios import STEPS, TRACE, Event, Scenario, drains, trace
from goodput_steps import NODES, Account, Pace, account, newest_step, read_groups
from protocol import machine, markdown
from shards.format.build import BuildSettings, build
from synthetic import records
from trainer.audit import audit
from trainer.checkpoint.errors import CheckpointError
from trainer.goodput import goodput_of

ARMS = (Ours.name, RayTrain.name, RestartAll.name)
SCENARIOS = ("drains", "trace")
NOTICES = ("with", "without")
_IMAGES = 100
_LOOK_S = 0.1


@dataclass(frozen=True)
class Result:
    """Of one run."""

    scenario: str
    notice: str
    arm: str
    account: Account
    settings: str
    """As `about` tells them."""
    split: dict[str, float] = field(default_factory=dict)
    """What `lxscale goodput` says of ours: its parts in seconds, `wall` and `lost steps`."""
    audit: str = ""


# --- a run --------------------------------------------------------------------------------------


def run(
    place: Path, data: Path, scenario: Scenario, arm: str, given: argparse.Namespace, notice: float
) -> Account:
    """Take an arm through a scenario. place: an empty folder for all that it writes."""
    log = place / "log"
    log.mkdir()
    config = run_config(data, place, scenario, given.fast_every)
    spec = Spec(str(place / "plain.yaml"), str(log), given.step_seconds, str(place / "plain"))
    Path(spec.config).write_text(json.dumps(config))
    makers: dict[str, Callable[[], Arm]] = {
        Ours.name: lambda: Ours(place, config, log, given.step_seconds),
        RayTrain.name: lambda: RayTrain(place, spec),
        RestartAll.name: lambda: RestartAll(place, spec),
    }
    nodes = makers[arm]()
    try:
        for _ in range(scenario.nodes):
            nodes.add()
        began = time.monotonic()
        nodes.start()
        node_seconds = _go_through(nodes, scenario, log, began, notice)
        wall = time.monotonic() - began
        # Before the end, which is none of the scenario's: a run that saves now loses nothing.
        return account(read_groups(log), wall, node_seconds, Pace(log, given.step_seconds))
    finally:
        nodes.close()


def _go_through(arm: Arm, scenario: Scenario, log: Path, began: float, notice: float) -> float:
    """Until the run's end, or the scenario's; the seconds of all nodes, NODES at most at a time."""
    events, warned = deque(scenario.events), deque[float]()
    there, since, node_seconds = scenario.nodes, 0.0, 0.0

    def due(event: Event, now: float) -> bool:
        if event.kind == "remove" and warned and now < warned[0] + notice:
            return False
        return now >= event.at and (not event.step or newest_step(log) >= event.step)

    while True:
        now = time.monotonic() - began
        node_seconds += (now - since) * min(there, NODES)
        since = now
        if not arm.running() or (scenario.seconds is not None and now >= scenario.seconds):
            return node_seconds
        if not events or not due(events[0], now):
            time.sleep(_LOOK_S)
            continue
        event = events.popleft()
        print(f"    {now:6.1f} s: {event.kind} at step {newest_step(log)}", flush=True)
        if event.kind == "add":
            arm.add()
            there += 1
        elif event.kind == "warn":
            arm.warn(notice)
            warned.append(time.monotonic() - began)
        else:
            arm.remove()
            there -= 1
            if warned:
                warned.popleft()


def run_config(data: Path, place: Path, scenario: Scenario, fast_every: int) -> dict[str, Any]:
    """Of ours; the plain loop takes its model, data, batch, steps and `checkpoint.every`."""
    return {
        "run": {"name": "ours", "storage": str(place)},
        "data": {"train": str(data), "cache": str(place / "cache")},
        "model": {
            "hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 64,
            "language_layers": 1,
            "object_layers": 1,
            "cross_layers": 1,
        },
        "train": {"steps": scenario.steps, "global_batch": 16, "log_every": 10},
        "checkpoint": {"every": scenario.every, "keep": 2, "fast_every": fast_every},
        "cluster": {"workers": f"1..{NODES}", "grow_after_s": 30, "max_failures": -1},
    }


def ours_says(place: Path) -> tuple[dict[str, float], str]:
    """The split of `lxscale goodput`, and the verdict of the audit."""
    run_url = str(place / "ours")
    found = goodput_of(run_url)
    split = found.seconds | {"wall": found.wall, "lost steps": float(found.lost_steps)}
    try:
        problems = audit(run_url, cache=str(place / "cache")).problems
    except CheckpointError as error:
        problems = [str(error)]
    return split, f"not proved: {problems[0]}" if problems else "proved"


# --- the report ---------------------------------------------------------------------------------


def report(results: Sequence[Result], about: str) -> str:
    text = f"# Goodput on nodes that come and go, {date.today()}, {machine()}\n\n{about}\n"
    for scenario in SCENARIOS:
        for notice in NOTICES:
            found = [r for r in results if (r.scenario, r.notice) == (scenario, notice)]
            if found:
                text += f"\n## {scenario}, {notice} notice\n\n{_table(found)}"
    ours = [r for r in results if r.split]
    if ours:
        text += "\n## What `lxscale goodput` and the audit say of ours\n\nSeconds.\n\n"
        names = list(ours[0].split)
        rows = [[name, *(f"{r.split[name]:.1f}" for r in ours)] for name in names]
        rows.append(["audit", *(r.audit for r in ours)])
        text += markdown(["", *(f"{r.scenario}, {r.notice} notice" for r in ours)], rows)
    return text


def _table(results: Sequence[Result]) -> str:
    peer = next((r.account for r in results if r.arm == RayTrain.name), None)
    header = ["", "steps kept", "made", "wasted", "wasted step-seconds", "wall, s", "goodput"]
    header += [
        "of the nodes' time",
        "recoveries",
        "mean recovery, s",
        "wasted / Ray Train's",
        "kept / s / Ray Train's",
    ]
    rows = []
    for r in sorted(results, key=lambda r: ARMS.index(r.arm)):
        a = r.account
        wasted = rate = "–"
        if peer and peer.kept:
            rate = f"{a.kept / a.wall / (peer.kept / peer.wall):.2f}"
            if peer.wasted_seconds:
                wasted = f"{a.wasted_seconds / peer.wasted_seconds:.2f}"
        rows.append(
            [
                r.arm,
                f"{a.kept:,}",
                f"{a.made:,}",
                f"{a.wasted:,}",
                f"{a.wasted_seconds:.1f}",
                f"{a.wall:.0f}",
                f"{a.goodput:.1%}",
                f"{a.of_nodes:.1%}",
                str(a.recoveries),
                "–" if a.recovery is None else f"{a.recovery:.1f}",
                wasted,
                rate,
            ]
        )
    return markdown(header, rows)


def read_record(path: Path, settings: str) -> list[Result]:
    """The newest result of each run with these settings."""
    found: dict[tuple[str, str, str], Result] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        result = Result(**{**entry, "account": Account(**entry["account"])})
        if result.settings == settings:
            found[result.scenario, result.notice, result.arm] = result
    return list(found.values())


# --- the command --------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenario", choices=SCENARIOS, nargs="+", default=SCENARIOS)
    parser.add_argument("--notices", choices=NOTICES, nargs="+", default=NOTICES)
    parser.add_argument("--arm", choices=ARMS, nargs="+", default=ARMS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the drains (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="of the trace (%(default)s)")
    parser.add_argument(
        "--step-seconds", type=float, default=0.2, help=f"on {NODES} workers (%(default)s)"
    )
    parser.add_argument(
        "--notice",
        type=float,
        default=6,
        help="seconds of notice (%(default)s, 30 steps: in Ray's case about 26)",
    )
    parser.add_argument("--fast-every", type=int, default=20, help="checkpoint.fast_every")
    parser.add_argument("--quick", action="store_true", help="a short look at every arm")
    parser.add_argument("--record", type=Path, help="results as JSON lines, read and added to")
    parser.add_argument("--out", type=Path, help="write the report there, too")
    given = parser.parse_args()
    if given.quick:
        given.scenario, given.notices, given.notice = ["drains"], ["with"], 2.0
        given.steps, given.step_seconds = 400, 0.1
    return given


def main() -> None:
    given = arguments()
    settings = about(given)
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="goodput-") as root:
        record = given.record or Path(root) / "record"
        data = Path(root) / "set"
        build(records(_IMAGES), data, BuildSettings("goodput", "random", images_per_shard=10))
        for scenario in given.scenario:
            for notice in given.notices:
                seconds = given.notice if notice == "with" else 0.0
                what = (
                    drains(given.steps, seconds)
                    if scenario == "drains"
                    else trace(TRACE, given.minutes, seconds, given.step_seconds)
                )
                done = {(r.scenario, r.notice, r.arm) for r in read_record(record, settings)}
                for arm in given.arm:
                    if (scenario, notice, arm) in done:
                        continue
                    print(f"{scenario}, {notice} notice: {arm}", flush=True)
                    place = Path(tempfile.mkdtemp(dir=root))
                    found = run(place, data, what, arm, given, seconds)
                    said = ours_says(place) if arm == Ours.name else ({}, "")
                    result = Result(scenario, notice, arm, found, settings, *said)
                    print(f"    {found}", *said, flush=True)
                    with open(record, "a") as file:
                        file.write(json.dumps(asdict(result)) + "\n")
        text = report(read_record(record, settings), settings)
    print("\n" + text)
    if given.out:
        given.out.write_text(text)


def about(given: argparse.Namespace) -> str:
    return (
        f"Drains: {given.steps:,} steps. Trace: {given.minutes:g} minutes. A step on {NODES} nodes "
        f"takes at least {given.step_seconds:g} s, on fewer in proportion longer. Notice: "
        f"{given.notice:g} s. Snapshots of ours in memory every {given.fast_every} steps. How each "
        "arm is set up: benchmarks/goodput.py.\n"
    )


if __name__ == "__main__":
    main()
