"""Step sync: what all ranks agree on before a step, in one all-reduce of a few numbers.

These are the targets of each objective and the mixture of the global batch, what is really in it,
who wants to stop, and which shards cannot be had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.objectives import target_counts
from model.objectives.base import LossSettings
from trainer.checkpoint.journal import digest, from_limbs, to_limbs
from trainer.data.loader import Loaded, MissingShard
from trainer.ranks import all_reduce_sum, gather_objects
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
    stop: bool
    """A rank wants to."""
    missing: list[MissingShard]
    """Shards that a rank cannot have. Nothing else here means anything if there are any."""


def sync_step(
    loaded: Loaded, objectives: list[str], losses: LossSettings, mixture: Mixture, stop: bool
) -> StepSync:
    """Sum what the ranks bring, before the forward. objectives: the active ones."""
    width = len(objectives) + len(mixture.planned)
    numbers = [0.0] * (width + 7)
    if loaded.missing:
        numbers[-1] = 1.0
    else:
        targets = [target_counts(batch, losses) for batch in loaded.batches]
        numbers = [
            *(sum(float(found[name]) for found in targets) for name in objectives),
            *mixture.count(loaded.batches, loaded.step.family),
            float(sum(batch.pairs for batch in loaded.batches)),
            *to_limbs(_digest(loaded)),
            float(stop),
            0.0,
        ]
    out = all_reduce_sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
    missing = [m for m in gather_objects(loaded.missing) if m] if out[-1] else []
    return StepSync(
        counts=dict(zip(objectives, out, strict=False)),
        mixture=out[len(objectives) : width],
        pairs=int(out[width]),
        digest=from_limbs(out[width + 1 : width + 5]),
        stop=bool(out[width + 5]),
        missing=missing,
    )


def _digest(loaded: Loaded) -> int:
    at = loaded.step.before.consumed
    total = sum(
        digest(at + b.offset.numpy(), b.pair_id.numpy(), b.sentence_id.numpy())
        for b in loaded.batches
    )
    return total % (1 << 64)
