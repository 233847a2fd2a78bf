"""What a person does with the generations of a run: list, verify and remove them.

`listing` reads manifests alone; `verify` reads all that they name, each object once, one at a time
in memory; `remove` verifies the generation that the run goes on from afterwards. No cost grows with
anything but the generations there are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from shards.progress import Progress, no_progress
from shards.store import objects
from shards.store.create import check_create_only
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import (
    LINK_PATTERN,
    CheckpointManifest,
    Entry,
    checkpoint_url,
)
from trainer.checkpoint.generations import (
    Generation,
    find_generation,
    named_generations,
    newest_whole,
    no_checkpoint,
    read_entry,
    run_and_manifest,
)
from trainer.checkpoint.line import Named, line_first
from trainer.checkpoint.owner import Claimant, check_free, claim

_LIVE = "stop that job first, or wait for its end"


@dataclass(frozen=True)
class Row:
    """A generation in a list. Of a damaged one only the manifest's name is known, and why."""

    manifest: str
    step: int | None = None
    attempt: int | None = None
    saved_at: str | None = None
    """UTC; None for one of an earlier version."""
    world_size: int | None = None
    zero_stage: int | None = None
    bytes: int | None = None
    """Of all that it names; generations have segments of the journal in common."""
    newest: bool = False
    """The run goes on from it, if its objects are whole."""
    problem: str | None = None


# --- list ---------------------------------------------------------------------------------------


def listing(run_url: str) -> list[Row]:
    """The generations of a run, newest first. CheckpointError where there is none."""
    known = _known(run_url)
    newest = newest_whole([found for _, found in known])
    return [
        Row(name, problem=found) if isinstance(found, str) else _row(found, found == newest)
        for name, found in known
    ]


def _row(generation: Generation, newest: bool) -> Row:
    manifest = generation.manifest
    return Row(
        generation.name,
        manifest.step,
        manifest.attempt,
        manifest.saved_at or None,
        manifest.world_size,
        manifest.zero_stage,
        sum(e.size for e in (*manifest.objects, *manifest.journal)),
        newest,
    )


def _known(run_url: str) -> list[Named]:
    known = list(named_generations(run_url))
    if not known:
        raise CheckpointError(no_checkpoint(run_url))
    return known


# --- verify -------------------------------------------------------------------------------------


def verify(path: str, progress: Progress = no_progress) -> tuple[int, list[str]]:
    """Read all that the generations of a run name, or the one of a manifest: how many generations
    there are, and a line for each problem. What an owner removes meanwhile is none."""
    run_url, name = run_and_manifest(path)
    known = _known(run_url)
    if name:
        known = [n for n in known if n[0] == name] or [(name, find_generation(path))]
    problems = [found for _, found in known if isinstance(found, str)]
    whole = [found for _, found in known if isinstance(found, Generation)]
    problems += [text for g in whole if (text := _uncovered(g))]
    users: dict[Entry, list[str]] = {}
    for generation in whole:
        for entry in (*generation.manifest.objects, *generation.manifest.journal):
            users.setdefault(entry, []).append(generation.name)
    damaged = _damaged(run_url, users, progress)
    present = set(objects.list_names(checkpoint_url(run_url))) if damaged else set()
    for entry, problem in damaged.items():
        if of := [user for user in users[entry] if user in present]:
            problems.append(f"{problem} (of {', '.join(of)})")
    return len(known), problems


def _damaged(run_url: str, entries: Collection[Entry], progress: Progress) -> dict[Entry, str]:
    """Those that are not what their manifests say, and why."""
    damaged = {}
    for done, entry in enumerate(entries, 1):
        try:
            read_entry(run_url, entry)
        except CheckpointError as error:
            damaged[entry] = str(error)
        progress("objects verified", done, len(entries))
    return damaged


def _is_whole(generation: Generation, progress: Progress) -> bool:
    """Whether a run can go on from it; the journal is for the audit alone."""
    entries = generation.manifest.objects
    return not (_uncovered(generation) or _damaged(generation.run_url, entries, progress))


def _uncovered(generation: Generation) -> str:
    """What of the model's parameters no object of a generation holds; "" where all is there."""
    manifest = generation.manifest
    missing = {name: math.prod(shape) for name, shape in manifest.parameters.items()}
    for entry in manifest.objects:
        for name, _, length in entry.fragments:
            missing[name] = missing.get(name, 0) - length
    wrong = [name for name, count in missing.items() if count]
    if not wrong:
        return ""
    return f"{generation.url}: its objects do not hold {wrong[0]} once and whole"


# --- remove -------------------------------------------------------------------------------------


def remove(
    path: str, steps: Sequence[int] = (), force: bool = False, progress: Progress = no_progress
) -> tuple[list[str], int]:
    """Remove generations of a run by their steps, or the one of a manifest; their names, and the
    step that the run goes on from.

    Raises OwnedError while a live job owns the run, CheckpointError where a step has no generation,
    where the newest whole one is meant without `force`, and where none that is whole would be left.
    Nothing is removed then.

    Whoever removes owns the run: it claims it as a job does. So nobody chooses, commits or prunes a
    generation beside it, and a job that was thought dead finds the claim. What the chain rests on
    (chain.py) is that a name which becomes free again is older than a generation that stays. Where
    the newest are to go, that is so once the one that stays is committed anew, as this attempt's:
    whatever a stale job still creates under a freed name comes before it, and goes with the next
    owner. From the moment of that commit the run goes on from there; a kill before it leaves all as
    it was, a kill after it what the next call removes.
    """
    run_url, name = run_and_manifest(path)
    if bool(name) == bool(steps):
        raise CheckpointError("name a run and steps of it with --step, or one manifest")
    free = check_free(run_url, Claimant(remedy=_LIVE))
    known = _known(run_url)
    chosen = {name} if name else _of_steps(known, steps)
    stays, newer = _what_stays(known, chosen, force, progress)
    check_create_only(run_url)
    owner = claim(run_url, free)
    try:
        if [n for n, _ in owner.known] != [n for n, _ in known]:
            raise CheckpointError(
                f"{run_url} has other generations than a moment ago, nothing is removed: look at "
                "them with `lxscale checkpoint ls`, and run the command again"
            )
        removed = sorted(chosen)
        if newer:
            again: CheckpointManifest = replace(stays.manifest, attempt=owner.attempt)
            owner.commit(again, len(known) + 1)
            chosen.add(stays.name)
        owner.remove(chosen)
    finally:
        owner.close()
    return removed, stays.step


def _of_steps(known: Sequence[Named], steps: Iterable[int]) -> set[str]:
    """The names of all generations of these steps; there may be several of one, where a run went
    back."""
    by_step: dict[int, set[str]] = {}
    for name, found in known:
        if isinstance(found, Generation):
            by_step.setdefault(found.step, set()).add(name)
    if absent := sorted(set(steps) - by_step.keys()):
        raise CheckpointError(
            f"there is no generation of step {', '.join(map(str, absent))}; there are those of "
            f"{', '.join(map(str, sorted(by_step))) or 'none'}"
        )
    return set().union(*(by_step[step] for step in steps))


def _what_stays(
    known: Sequence[Named], chosen: Collection[str], force: bool, progress: Progress
) -> tuple[Generation, bool]:
    """The generation that the run goes on from once the chosen ones are gone, which is whole; and
    whether one that is newer is chosen."""
    for name in chosen:
        found = dict(known).get(name)
        if found is None:
            raise CheckpointError(f"there is no generation {name}")
        if isinstance(found, str) and LINK_PATTERN.fullmatch(name):
            # Claims are never removed: a free name would let a stale job go on.
            raise CheckpointError(f"{found}; it may be a claim and stays. It is in nobody's way")
    # In the order in which a start tries them: what a run that went back has left comes last.
    for name, found in line_first(known):
        if (name in chosen and force) or isinstance(found, str) or not _is_whole(found, progress):
            continue
        if name not in chosen:
            newer = known[: known.index((name, found))]
            return found, any(n in chosen for n, _ in newer)
        else:
            raise CheckpointError(
                f"{found.url} (step {found.step}) is the newest whole generation, from which the "
                "run goes on: to remove it, and make the steps anew from an earlier one, give "
                "--force"
            )
    raise CheckpointError(
        "no whole generation would be left, and the run could not go on: to give it up, remove "
        "its folder"
    )
