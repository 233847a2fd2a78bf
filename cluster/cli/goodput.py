"""`lxscale goodput`: what part of a run's time is in steps that are kept, and where the rest is."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from shards.arguments import given_place
from shards.urls import shown

if TYPE_CHECKING:
    from trainer.goodput import Goodput, Part

# Faults that are listed, the newest.
_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_place, help="a run's folder or URL")
    parser.add_argument("--json", action="store_true", help="all of it, for programs")
    parser.set_defaults(func=_goodput)


def _goodput(arguments: argparse.Namespace) -> int:
    from trainer.goodput import goodput_of  # with torch, which other commands do without

    found = goodput_of(arguments.run)
    if arguments.json:
        more = {"share": found.share, "share_of_jobs": found.share_of_jobs, "faults": found.faults}
        print(shown(json.dumps({**asdict(found), **more})))
    else:
        for line in lines_of(found):
            print(shown(line))
    return 0 if found.share is not None else 1


def lines_of(found: Goodput) -> list[str]:
    """What the command shows."""
    if found.share is None or found.share_of_jobs is None:
        return [
            f"{found.run}: step {found.step:,}; its goodput is not known, as no timeline was kept "
            "(it was trained by an older lxscale)"
        ]
    out = [
        f"{found.run}: goodput {found.share:.1%} ({found.share_of_jobs:.1%} while there was a job)",
        f"step {found.step:,} is saved; {found.lost_steps:,} steps were lost to {found.faults} "
        f"faults, {found.unsaved_steps:,} are not saved yet",
    ]
    for name, seconds in found.seconds.items():
        replay = f"  ({found.replay:.1f} s of it replay)" if name == "kept" else ""
        out.append(f"  {name:<12}{seconds:12.1f} s {seconds / found.wall:7.1%}{replay}")
    out.append(f"  {'wall':<12}{found.wall:12.1f} s")
    if found.unknown_steps:
        out.append(f"of {found.unknown_steps:,} of the saved steps the time is not known")
    pairs = [(p, q) for p, q in _with_next(found.parts) if p.kind not in ("done", "away")]
    if len(pairs) > _LISTED:
        out.append(f"… {len(pairs) - _LISTED} more")
    return out + [_ending(p, q) for p, q in pairs[-_LISTED:]]


def _with_next(parts: tuple[Part, ...]) -> list[tuple[Part, Part | None]]:
    """Each group with the one after it."""
    groups = [p for p in parts if p.kind != "away"]
    return list(zip(groups, [*groups[1:], None], strict=True))


def _ending(part: Part, after: Part | None) -> str:
    """A line about the end of a group, and what it took to be where it was again."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(part.ended))
    cost = {name: part.seconds.get(name, 0.0) for name in ("detect", "tear down")}
    if after:
        cost |= {name: after.seconds.get(name, 0.0) for name in ("re-form", "restore")}
        cost["replay"] = after.replay
    costs = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in cost.items())
    what = part.text or {"killed": "killed with its driver"}.get(part.kind, part.kind)
    return (
        f"{at} UTC, attempt {part.attempt or '?'} at step {part.step:,}: {what} | "
        f"{part.lost_steps:,} steps lost | {costs}"
    )
