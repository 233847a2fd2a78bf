"""Which generations lead to a run's newest one, and which of them it goes on from.

A run that goes back (checkpoint.resume_from), or past a damaged generation, leaves some behind:
they are older in the chain and no part of its history. The journal tells: a generation descends
from another one if its segments begin with all of that one's. So no state is kept about going back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.format import CheckpointManifest
from trainer.checkpoint.generations import Generation, newest_whole

log = logging.getLogger("lxscale")

Named = tuple[str, Generation | str]
"""A manifest's name, and its generation or what is wrong with it."""


def descends(newer: CheckpointManifest, older: CheckpointManifest) -> bool:
    """Whether the run went through `older` to get to `newer`, or they are one state."""
    return older.step <= newer.step and older.journal == newer.journal[: len(older.journal)]


def line_first(known: Sequence[Named]) -> list[Named]:
    """Generations, newest first, with those last that do not lead to the newest. What a damaged
    manifest was is not known: it keeps its place among those that do."""
    newest = newest_whole([found for _, found in known])
    return sorted(known, key=lambda named: newest is not None and not _leads(named[1], newest))


def going_on_from(found: Sequence[Generation | str], step: int | None) -> list[Generation | str]:
    """What a run tries to go on from, in this order. found: its generations, newest first.

    step: checkpoint.resume_from. Then it is the generation of that step alone; or, where the newest
    one came to be with the same wish, that one and those that lead to it: the run has gone on from
    the step already. CheckpointError names the steps there are where that one is not.
    """
    newest = newest_whole(found)
    if step is None or (newest and has_gone_on(newest, step)):
        ordered = [f for _, f in line_first([("", f) for f in found])]
        return ordered if step is None else [f for f in ordered if newest and _leads(f, newest)]
    whole = [g for g in found if isinstance(g, Generation)]
    chosen = next((g for g in whole if g.step == step), None)
    if chosen is None:
        steps = ", ".join(str(s) for s in sorted({g.step for g in whole})) or "none"
        raise CheckpointError(
            f"checkpoint.resume_from={step}: the run has no generation of that step, it has those "
            f"of {steps}"
        )
    return [chosen]


def say_where(found: Sequence[Generation | str], generation: Generation, step: int | None) -> None:
    """Log what checkpoint.resume_from has come to. generation: that the run goes on from."""
    newest = newest_whole(found)
    if step is None or newest is None:
        return
    if has_gone_on(newest, step):
        log.info(
            "checkpoint.resume_from=%d: the run has gone on from there, and does so from step %d",
            step,
            generation.step,
        )
    elif newest != generation:
        log.warning(
            "checkpoint.resume_from=%d: going back from step %d to %s; the steps since are made "
            "anew, and what was saved of them goes as newer checkpoints come",
            step,
            newest.step,
            generation.url,
        )


def _leads(found: Generation | str, newest: Generation) -> bool:
    return isinstance(found, str) or descends(newest.manifest, found.manifest)


def has_gone_on(newest: Generation, step: int) -> bool:
    """Whether the run's newest generation was made with checkpoint.resume_from=step."""
    made_with = newest.manifest.config.get("checkpoint", {}).get("resume_from")
    return bool(made_with == step)
