"""What all ranks agree on about a step.

Of its data, before it: the targets of each objective and the mixture of the global batch, what is
really in it, and which shards cannot be had. All of it is known once the step is loaded, so it is
summed while the step before is made. Over n ranks that takes gloo's ring 2 (n - 1) messages in a
row, which a step need not wait for.

Of what follows it: who wants to stop, whether and where to save, and what the run must end with.
These flags ride with the sums of the step's losses, and so are never older than the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model.objectives import target_counts
from model.objectives.base import LossSettings
from trainer.checkpoint.journal import from_limbs, to_limbs
from trainer.data.digest import digest
from trainer.data.loader import Loaded, MissingShard
from trainer.ranks import begin_all_reduce_sum, gather_objects, raise_from_rank_0
from trainer.step.mixture import Mixture


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
    missing: list[MissingShard]
    """Shards that a rank cannot have. Nothing else here means anything if there are any."""


def begin_sync(
    loaded: Loaded, objectives: list[str], losses: LossSettings, mixture: Mixture
) -> Callable[[], StepSync]:
    """Begin to sum what the ranks bring; what is returned waits for it. Every rank begins a step's,
    and waits, at the same place. objectives: the active ones."""
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
    numbers.append(float(loaded.missing is not None))
    sums = begin_all_reduce_sum(torch.tensor(numbers, dtype=torch.float64))
    own = loaded.missing

    def synced() -> StepSync:
        out = sums().tolist()
        return StepSync(
            counts=dict(zip(objectives, out, strict=False)),
            mixture=out[len(objectives) : width],
            pairs=int(out[width]),
            digest=from_limbs(out[width + 1 : width + 5]),
            missing=[m for m in gather_objects(own) if m] if out[-1] else [],
        )

    return synced


@dataclass(frozen=True)
class Wants:
    """What a rank wants after a step."""

    stop: bool = False
    """It wants all to stop."""
    save: bool = False
    """Rank 0's: a save is due."""
    full: bool = False
    """It has no room for one."""
    error: Exception | None = None
    """Rank 0's: what all must end with."""
    snapshot: bool = False
    """One in the nodes' memory is due; all ranks say the same."""
    busy: bool = False
    """It cannot make one, as it is at the one before."""

    def flags(self) -> list[float]:
        """What is summed over the ranks, for `verdict`."""
        return [*map(float, (self.stop, self.save, self.full, bool(self.error), self.busy))]


@dataclass(frozen=True)
class Verdict:
    """What all ranks do after a step, the same on every rank."""

    stop: bool
    """A rank wants to."""
    save: bool
    """A save is due, and every rank has room for it."""
    snapshot: bool
    """One in the nodes' memory is, and no rank is at the one before."""


def verdict(wants: Wants, sums: Sequence[float]) -> Verdict:
    """What follows from the sums of the ranks' flags; raises rank 0's error on every rank."""
    stop, save, full, error, busy = map(bool, sums)
    if error:
        raise_from_rank_0(wants.error)
    return Verdict(stop, save and not full, wants.snapshot and not busy)


def _digest(loaded: Loaded) -> int:
    at = loaded.step.before.consumed
    return sum(digest(batch, at) for batch in loaded.batches) % (1 << 64)
