"""What is said of steps whose loss or gradients are not finite.

train_step.py makes no update of weights or moments in such a step, on no rank; run.py counts them,
and ends the run after too many in a row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from shards.dataset import Dataset
from shards.order.sampler import Sampler, Step
from trainer.errors import DivergedError
from trainer.progress import some_of


def skip_report(step: int, losses: Mapping[str, float], skipped: int, in_a_row: int) -> str:
    """One line on a step without an update. losses: of each objective, in this step."""
    bad = [f"{name}={value:g}" for name, value in losses.items() if not math.isfinite(value)]
    shown = " ".join(bad) if bad else "the gradients, every loss is finite"
    return (
        f"step {step}: loss or gradients are not finite ({shown}), its update is skipped "
        f"({skipped} in all, {in_a_row} in a row)"
    )


def diverged(last: int, steps: Sequence[Step], data: Dataset, sampler: Sampler) -> DivergedError:
    """The error that ends a run after `steps`, the last of which is step number `last`. Shards that
    most of them have in common are named first."""
    holds: Counter[int] = Counter()
    for step in steps:
        plan = sampler.plan(step).without(step.before.skipped_shards)
        holds.update(np.unique(plan.shard).tolist())
    shards = sorted(holds, key=lambda shard: (-holds[shard], shard))
    names = some_of([data.shards.files[shard].url for shard in shards])
    numbers = f"step {last}" if len(steps) == 1 else f"steps {last - len(steps) + 1} to {last}"
    begin, end = steps[0].before.consumed, steps[-1].after.consumed
    return DivergedError(
        f"loss or gradients are not finite in {numbers}, more in a row than "
        f"train.max_skipped_updates allows; they took pairs [{begin}, {end}) of the run, which lie "
        f"in {names}: look at these data, change train.precision, or lower optimizer.lr (with "
        "checkpoint.override_settings=true). The same command goes on from the last checkpoint, "
        "before these steps"
    )
