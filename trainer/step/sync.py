"""Step sync: what all ranks agree on before a step, in one all-reduce of a few numbers.

These are the targets of each objective and the mixture of the global batch, what is really in it,
who wants to stop, whether and where to save, which shards cannot be had, and what the run must end
with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.objectives import target_counts
from model.objectives.base import LossSettings
from trainer.checkpoint.journal import from_limbs, to_limbs
from trainer.data.digest import digest
from trainer.data.loader import Loaded, MissingShard
from trainer.ranks import all_reduce_sum, gather_objects, raise_from_rank_0
from trainer.step.mixture import Mixture


@dataclass(frozen=True)
class Wants:
    """What a rank brings to a step beside its data."""

    stop: bool = False
    """It wants all to stop before this step."""
    save: bool = False
    """Rank 0's: a save is due after this step."""
    full: bool = False
    """It has no room for one."""
    error: Exception | None = None
    """Rank 0's: what all must end with, before this step."""
    snapshot: bool = False
    """One in the nodes' memory is due after this step; all ranks say the same."""
    busy: bool = False
    """It cannot make one, as it is at the one before."""


@dataclass(frozen=True)
class StepSync:
    """What all ranks together bring to a step, the same on every rank."""

    counts: dict[str, float]
    """Targets of each active objective."""
    mixture: list[float]
    """Pairs that each name of the planned mixture counts."""
    pairs: int
    """Pairs that are really there: fewer than the step's where shards are skipped."""
    digest: int
    """Of these pairs, for the journal."""
    stop: bool
    """A rank wants to."""
    save: bool
    """A save is due after the step, and every rank has room for it."""
    snapshot: bool
    """One in the nodes' memory is, and no rank is at the one before."""
    missing: list[MissingShard]
    """Shards that a rank cannot have. Nothing else here means anything if there are any."""


def sync_step(
    loaded: Loaded, objectives: list[str], losses: LossSettings, mixture: Mixture, wants: Wants
) -> StepSync:
    """Sum what the ranks bring, before the forward; raises rank 0's error on every rank.
    objectives: the active ones."""
    width = len(objectives) + len(mixture.planned)
    numbers = [0.0] * (width + 5)
    if not loaded.missing:
        targets = [target_counts(batch, losses, objectives) for batch in loaded.batches]
        numbers = [
            *(sum(float(found[name]) for found in targets) for name in objectives),
            *mixture.count(loaded.batches, loaded.step.family),
            float(sum(batch.pairs for batch in loaded.batches)),
            *to_limbs(_digest(loaded)),
        ]
    flags = (
        bool(loaded.missing),
        wants.stop,
        wants.save,
        wants.full,
        wants.error is not None,
        wants.busy,
    )
    numbers += map(float, flags)
    out = all_reduce_sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
    some_missing, stop, save, full, error, busy = map(bool, out[-len(flags) :])
    if error:
        raise_from_rank_0(wants.error)
    missing = [m for m in gather_objects(loaded.missing) if m] if some_missing else []
    return StepSync(
        counts=dict(zip(objectives, out, strict=False)),
        mixture=out[len(objectives) : width],
        pairs=int(out[width]),
        digest=from_limbs(out[width + 1 : width + 5]),
        stop=stop,
        save=save and not full,
        snapshot=wants.snapshot and not busy,
        missing=missing,
    )


def _digest(loaded: Loaded) -> int:
    at = loaded.step.before.consumed
    return sum(digest(batch, at) for batch in loaded.batches) % (1 << 64)
