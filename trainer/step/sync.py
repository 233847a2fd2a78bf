"""What all ranks agree on before a step, in one all-reduce of a few numbers: targets and shares,
what is really there, who wants to stop, and which shards cannot be had.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from model.objectives import target_counts
from shards.dataset import Dataset
from shards.errors import DataError
from shards.order.sampler import SamplerState
from trainer.checkpoint.journal import digest, from_limbs, to_limbs
from trainer.config import RunConfig
from trainer.data.loader import Loaded, MissingShard
from trainer.step.engine import all_reduce_sum
from trainer.step.mixture import count_mixture

log = logging.getLogger("lxscale")


@dataclass(frozen=True)
class Seen:
    """What all ranks together bring to a step, the same on every rank.

    counts: targets of each objective; shares: pairs that each planned share counts; pairs and
    digest: of what is really there; stop: a rank wants to; trouble: shards that cannot be had.
    """

    counts: dict[str, float]
    shares: list[float]
    pairs: int
    digest: int
    stop: bool
    trouble: list[MissingShard]


def look_around(
    micro: Loaded,
    active: dict[str, float],
    config: RunConfig,
    shares: list[str],
    family: str,
    data: Dataset,
    state: SamplerState,
    stop: bool,
) -> Seen:
    """One all-reduce before the forward, of everything that ranks must agree on."""
    names = sorted(active)
    numbers = [0.0] * (len(names) + len(shares) + 7)
    if isinstance(micro, MissingShard):
        numbers[-1] = 1.0
    else:
        found = [target_counts(batch, config.objectives.losses()) for batch in micro]
        total = sum(
            digest(state.consumed + b.offset.numpy(), b.pair_id.numpy(), b.sentence_id.numpy())
            for b in micro
        )
        numbers = [
            *(sum(float(counts[n]) for counts in found) for n in names),
            *count_mixture(shares, micro, family, data),
            float(sum(b.pairs for b in micro)),
            *to_limbs(total % (1 << 64)),
            float(stop),
            0.0,
        ]
    out = all_reduce_sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
    trouble: list[MissingShard] = []
    if out[-1]:
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, micro if isinstance(micro, MissingShard) else None)
        trouble = [t for t in told if t]
    k = len(names)
    return Seen(
        dict(zip(names, out[:k], strict=True)),
        out[k : k + len(shares)],
        int(out[-7]),
        from_limbs(out[-6:-2]),
        bool(out[-2]),
        trouble,
    )


def skip(
    config: RunConfig, data: Dataset, state: SamplerState, trouble: list[MissingShard]
) -> SamplerState:
    """Pass over shards that cannot be had, from this step on and on every rank; or, without
    data.on_error=skip, end the run on every rank with the same error."""
    if config.data.on_error == "fail":
        raise DataError(trouble[0].message)
    fresh = {t.shard: t.message for t in trouble}
    skipped = (*state.skipped, *((shard, state.consumed) for shard in sorted(fresh)))
    if len(skipped) == len(data.manifest.shards):
        raise DataError(f"no shard of {data.url} can be had: {trouble[0].message}")
    if dist.get_rank() == 0:
        for shard, message in sorted(fresh.items()):
            name, pairs = data.shards.files[shard].url, data.manifest.shards[shard].pairs
            log.error("skipping %s and its %d pairs from here on: %s", name, pairs, message)
    return replace(state, skipped=skipped)


def skip_report(state: SamplerState) -> str:
    return (
        f"data.on_error=skip: {len(state.skipped)} shards are passed over, "
        f"{state.skipped_pairs} pairs so far"
    )
